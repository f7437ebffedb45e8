"""From a ModelConfig to what is launched: resolved paths, the dataclass engines see, and a digest that tells when to relaunch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from models_app.engines.base import ModelSpec
from models_app.model_rules import resolve_model_path
from models_app.models import ModelConfig

# A change of any of these needs a new process; a change of anything else does not.
LAUNCH_FIELDS = (
    "name",
    "engine",
    "chat_model_path",
    "embedding_model_path",
    "tts_model_path",
    "prompt_template",
    "ctx_size",
    "batch_size",
    "slots",
    "threads",
    "gpu_layers",
    "extra_args",
    "port",
)


def digest(config: ModelConfig) -> str:
    """SHA-256 of everything the process depends on, without touching the file system: other nodes' files are not ours."""
    values = {field: getattr(config, field) for field in LAUNCH_FIELDS}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def model_spec(config: ModelConfig) -> ModelSpec:
    """What the engine adapter gets. Raises PathNotAllowed."""

    def path(text: str) -> Path | None:
        return resolve_model_path(text) if text else None

    return ModelSpec(
        name=config.name,
        chat_model_path=path(config.chat_model_path),
        embedding_model_path=path(config.embedding_model_path),
        tts_model_path=path(config.tts_model_path),
        prompt_template=config.prompt_template,
        ctx_size=config.ctx_size,
        batch_size=config.batch_size,
        slots=config.slots,
        threads=config.threads,
        gpu_layers=config.gpu_layers,
        extra_args=config.extra_args,
    )


def load_deadline_s(spec: ModelSpec) -> float:
    """Seconds a load may take: 5 minutes and 20 s per GiB of weights."""
    paths = (spec.chat_model_path, spec.embedding_model_path, spec.tts_model_path)
    weights = sum(path.stat().st_size for path in paths if path is not None)
    return 300.0 + 20.0 * weights / (1 << 30)
