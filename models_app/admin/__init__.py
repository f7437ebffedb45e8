"""The admin pages, one module per model. Importing this package registers them (Django's autodiscovery does)."""

from models_app.admin import (
    api_key,
    incident,
    instance,
    load,
    model_alias,
    model_config,
    node,
    overview,
    remote_server,
    usage,
    users,
)

__all__ = [
    "api_key",
    "incident",
    "instance",
    "load",
    "model_alias",
    "model_config",
    "node",
    "overview",
    "remote_server",
    "usage",
    "users",
]
