"""Django application configuration."""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.db import connections
from django.db.models.signals import post_migrate, pre_migrate


class ModelsAppConfig(AppConfig):
    name = "models_app"
    verbose_name = "Assistant"

    def ready(self) -> None:
        pre_migrate.connect(remove_triggers, sender=self)
        post_migrate.connect(install_triggers, sender=self)


def remove_triggers(using: str, plan: list[Any], **_: Any) -> None:
    """SQLite will not rename a table that a trigger of another one names, as rebuilding a table does."""
    from models_app.models import triggers

    if plan:
        triggers.remove(connections[using])


def install_triggers(using: str, **_: Any) -> None:
    """Make the revision triggers anew; a migration may have rebuilt a table without them. Half-way to this release they wait."""
    from models_app.models import triggers

    connection = connections[using]
    if triggers.fit(connection):
        triggers.install(connection)
