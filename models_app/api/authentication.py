"""Who is calling: a session of the admin, or an API key with the scope admin."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

from django.contrib.auth.models import User
from django.db import OperationalError
from django.utils import timezone
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.request import Request

from models_app.contracts import key_material
from models_app.models import APIKey

LAST_USED_EVERY = timedelta(minutes=1)


class KeyAuthentication(BaseAuthentication):
    """`Authorization: Bearer <key>`; request.user becomes the key's user, request.auth the key.

    Whether the key may do anything here is for the permission class: a well-formed key without the scope is 403, not 401.
    """

    def authenticate(self, request: Request) -> tuple[User, APIKey] | None:
        scheme, _, text = request.META.get("HTTP_AUTHORIZATION", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        text = text.strip()
        key = self._usable(text) if key_material.well_formed(text) else None
        if key is None:
            raise AuthenticationFailed(
                f"This API key is not valid, or no longer: {key_material.masked(text)}.", "invalid_api_key"
            )
        self._note_use(key)
        return key.user, key

    def authenticate_header(self, request: Request) -> str:
        return 'Bearer realm="assistant"'

    @staticmethod
    def _usable(text: str) -> APIKey | None:
        return APIKey.objects.usable().select_related("user").filter(digest=key_material.digest(text)).first()

    @staticmethod
    def _note_use(key: APIKey) -> None:
        """At most one write a minute and key. A database that is locked just now is no reason to refuse a read."""
        now = timezone.now()
        if key.last_used_at is None or now - key.last_used_at > LAST_USED_EVERY:
            with suppress(OperationalError):
                APIKey.objects.filter(pk=key.pk).update(last_used_at=now)
