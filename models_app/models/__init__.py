"""Desired and observed state. Names here are the names of the REST API."""

from models_app.models.api_key import APIKey
from models_app.models.incident import Incident
from models_app.models.instance import Cause, DrainReason, Instance, State
from models_app.models.load import Load
from models_app.models.model_config import ModelAlias, ModelConfig
from models_app.models.node import Node
from models_app.models.remote_server import RemoteServer
from models_app.models.revision import Revision, Tombstone
from models_app.models.usage import UsageEvent

__all__ = [
    "APIKey",
    "Cause",
    "DrainReason",
    "Incident",
    "Instance",
    "Load",
    "ModelAlias",
    "ModelConfig",
    "Node",
    "RemoteServer",
    "Revision",
    "State",
    "Tombstone",
    "UsageEvent",
]
