"""Django application configuration."""

from __future__ import annotations

from django.apps import AppConfig


class AssistantSiteConfig(AppConfig):
    name = "assistant_site"
    verbose_name = "Assistant"
