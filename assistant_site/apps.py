"""Django application configuration."""

from __future__ import annotations

from django.apps import AppConfig, apps


class AssistantSiteConfig(AppConfig):
    name = "assistant_site"
    verbose_name = "Assistant"

    def ready(self) -> None:
        """Make our Celery application the current one, so that tasks can be sent from any process that has the admin."""
        if apps.is_installed("django.contrib.admin"):  # gateway and gRPC sidecar never talk to Celery
            from assistant_site import celery  # noqa: F401
