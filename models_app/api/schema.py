"""What drf-spectacular must be told. A module of its own: importing it needs DRF to be loaded whole."""

from __future__ import annotations

from typing import Any

from drf_spectacular.extensions import OpenApiAuthenticationExtension
from drf_spectacular.openapi import AutoSchema

from models_app.api.authentication import KeyAuthentication


class KeyAuthenticationScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]  # its registering base
    """Registers itself by being defined."""

    target_class = KeyAuthentication
    name = "adminKey"

    def get_security_definition(self, auto_schema: AutoSchema) -> dict[str, Any]:
        return {"type": "http", "scheme": "bearer", "description": "An API key with the scope `admin`."}
