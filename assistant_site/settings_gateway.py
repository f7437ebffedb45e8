"""Settings of the gateway and the gRPC sidecar: no admin, no DRF, no unfold, no templates, no URL routes."""

from __future__ import annotations

from assistant_site.settings import *  # noqa: F403  # one source for every knob

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "assistant_site",
    "models_app",
    "gateway_app",
]
MIDDLEWARE = []
TEMPLATES = []
ROOT_URLCONF = "assistant_site.urls_gateway"
