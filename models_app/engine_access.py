"""Engine adapters with this installation's settings: the one way the rest of the control plane gets at an engine."""

from __future__ import annotations

from django.conf import settings

from models_app.engines import registry
from models_app.engines.base import EngineAdapter, EngineSettings


def engine_settings() -> EngineSettings:
    """Where this node has its engines."""
    return EngineSettings(
        wasmedge=settings.ASSISTANT_WASMEDGE,
        wasm_file=settings.ASSISTANT_WASM_FILE,
        wasm_sha256=settings.ASSISTANT_WASM_SHA256,
        llama_server=settings.ASSISTANT_LLAMA_SERVER,
    )


def adapter(name: str) -> EngineAdapter:
    """The adapter of this engine; PreflightError where there is none."""
    return registry.adapter(name, engine_settings())
