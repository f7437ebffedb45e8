"""Django application configuration."""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.db import connections
from django.db.models.signals import post_migrate


class ModelsAppConfig(AppConfig):
    name = "models_app"
    verbose_name = "Assistant"

    def ready(self) -> None:
        post_migrate.connect(install_triggers, sender=self)


def install_triggers(using: str, **_: Any) -> None:
    """Make the revision triggers anew; a migration may have rebuilt a table without them."""
    from models_app.models import triggers

    connection = connections[using]
    if {"models_app_revision", "models_app_apikey"} <= set(connection.introspection.table_names()):
        triggers.install(connection)
