"""How lists are paged and filtered. Filters are plain query parameters, named like the field."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from django.core.exceptions import ValidationError
from django.db.models import Field, IntegerField, Model, QuerySet
from django.db.models.fields import BooleanField
from django.utils import timezone
from rest_framework import exceptions
from rest_framework.filters import BaseFilterBackend
from rest_framework.pagination import CursorPagination, PageNumberPagination
from rest_framework.request import Request

if TYPE_CHECKING:
    from rest_framework.views import APIView  # DRF is half loaded when it imports this module

M = TypeVar("M", bound=Model)
R = TypeVar("R")

PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


class Pages(PageNumberPagination):
    """?page=2&page_size=200"""

    page_size = PAGE_SIZE
    page_size_query_param = "page_size"
    max_page_size = MAX_PAGE_SIZE


class NewestFirst(CursorPagination):
    """For tables that grow without end: no count, no offset."""

    page_size = PAGE_SIZE
    page_size_query_param = "page_size"
    max_page_size = MAX_PAGE_SIZE
    ordering = ("-started_at", "-id")


class QueryFilter(BaseFilterBackend):
    """?name=value for the names in the view's filter_fields: {parameter: ORM look-up}. A value of the wrong type is 400."""

    def filter_queryset(self, request: Request, queryset: QuerySet[M, R], view: APIView) -> QuerySet[M, R]:
        for parameter, lookup in _filter_fields(view).items():
            raw = request.query_params.get(parameter)
            if raw is not None:
                queryset = queryset.filter(**{lookup: _value(queryset.model, parameter, lookup, raw)})
        return queryset

    def get_schema_operation_parameters(self, view: APIView) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "in": "query",
                "required": False,
                "schema": {"type": "string"},
                "description": f"Only where {name} is this.",
            }
            for name in _filter_fields(view)
        ]


def _filter_fields(view: APIView) -> dict[str, str]:
    return getattr(view, "filter_fields", {})


def _value(model: type[Model], parameter: str, lookup: str, raw: str) -> Any:
    field = _field(model, lookup)
    if isinstance(field, BooleanField):
        if raw.lower() not in BOOLEANS:
            raise exceptions.ValidationError({parameter: ["Give true or false."]})
        return BOOLEANS[raw.lower()]
    try:
        value = field.to_python(raw)
        if isinstance(field, IntegerField):
            field.run_validators(value)  # one that is too large for the database would fail there
    except ValidationError as error:
        raise exceptions.ValidationError({parameter: error.messages}) from None
    if value is None or "\0" in raw:
        raise exceptions.ValidationError({parameter: ["This value does not fit."]})
    # A time without an offset, such as a bare date, is meant in the server's time zone.
    return timezone.make_aware(value) if isinstance(value, datetime) and timezone.is_naive(value) else value


def _field(model: type[Model], lookup: str) -> Field[Any, Any]:
    """The concrete field that a look-up such as user__username or started_at__gte ends in."""
    field: Any = None
    for part in lookup.split("__"):
        if field is not None and not field.is_relation:
            break  # the rest is a comparison, such as gte
        field = model._meta.get_field(part)
        model = field.related_model or model
    target = field.target_field if field.is_relation else field
    assert isinstance(target, Field), lookup
    return target
