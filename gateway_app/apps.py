"""Django application configuration."""

from __future__ import annotations

from django.apps import AppConfig


class GatewayAppConfig(AppConfig):
    name = "gateway_app"
    verbose_name = "Assistant"
