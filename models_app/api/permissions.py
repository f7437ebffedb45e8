"""What a caller may do: staff, with the same model permissions as in the admin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rest_framework.permissions import BasePermission, DjangoModelPermissions
from rest_framework.request import Request

from models_app.models import APIKey
from models_app.models.api_key import ADMIN

if TYPE_CHECKING:
    from rest_framework.views import APIView  # DRF is half loaded when it imports this module

VIEW, ADD, CHANGE, DELETE = (f"%(app_label)s.{verb}_%(model_name)s" for verb in ("view", "add", "change", "delete"))


def may_enter(request: Request) -> bool:
    """Active staff; a key must have the scope admin besides."""
    if isinstance(request.auth, APIKey) and ADMIN not in request.auth.scopes:
        return False
    return bool(request.user and request.user.is_active and request.user.is_staff)


class MayEnter(BasePermission):
    """Staff only, for views without a model."""

    def has_permission(self, request: Request, view: APIView) -> bool:
        return may_enter(request)


class MayAdminister(DjangoModelPermissions):
    """Staff with the model permission of the verb; an action on one item (start, revoke, …) needs “change”."""

    perms_map = {  # noqa: RUF012  # an instance variable to DRF's types
        "GET": [VIEW],
        "HEAD": [VIEW],
        "OPTIONS": [VIEW],
        "POST": [ADD],
        "PUT": [CHANGE],
        "PATCH": [CHANGE],
        "DELETE": [DELETE],
    }

    def has_permission(self, request: Request, view: APIView) -> bool:
        return may_enter(request) and super().has_permission(request, view)


class MayOperate(MayAdminister):
    """For actions on one item: the model's “change” permission."""

    perms_map = {**MayAdminister.perms_map, "POST": [CHANGE]}  # noqa: RUF012
