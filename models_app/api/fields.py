"""Field types of this API."""

from __future__ import annotations

from typing import Any, ClassVar

from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers


@extend_schema_field({"oneOf": [{"type": "integer"}, {"type": "string"}]})
class IdOrName(serializers.PrimaryKeyRelatedField[Any]):
    """A row by its id or by its name; answered as its id."""

    default_error_messages: ClassVar = {"unknown": "There is none called “{name}”."}

    def __init__(self, *, name_field: str = "name", **kwargs: Any) -> None:
        self.name_field = name_field
        super().__init__(**kwargs)

    def to_internal_value(self, data: Any) -> Any:
        if not isinstance(data, str) or data.isdigit():
            return super().to_internal_value(data)
        rows = self.get_queryset()
        assert rows is not None, "an IdOrName that is written needs a queryset"
        # PostgreSQL cannot even be asked for a text with a zero byte.
        found = None if "\0" in data else rows.filter(**{self.name_field: data}).first()
        if found is None:
            self.fail("unknown", name=data)
        return found


@extend_schema_field(OpenApiTypes.OBJECT)
class ObjectField(serializers.JSONField):
    """A JSON object, not just any JSON value."""

    default_error_messages: ClassVar = {"not_object": "Give an object of names and values."}

    def to_internal_value(self, data: Any) -> dict[str, Any]:
        value = super().to_internal_value(data)
        if not isinstance(value, dict):
            self.fail("not_object")
        return value
