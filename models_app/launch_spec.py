"""From a ModelConfig to what is launched: resolved paths, the dataclass engines see, and a digest that tells when to relaunch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models_app.contracts.traits import CHAT_ROLE, EMBEDDING_ROLE, SPEECH_ROLE, TRAITS, WHOLE
from models_app.engines import options, registry
from models_app.engines.base import ModelSpec
from models_app.model_rules import resolve_model_path
from models_app.models import ModelConfig

PATH_OF_ROLE = {CHAT_ROLE: "chat_model_path", EMBEDDING_ROLE: "embedding_model_path", SPEECH_ROLE: "tts_model_path"}
# A change of any of these needs a new process, as does one of the paths it serves; a change of anything else does not.
LAUNCH_FIELDS = (
    "name",
    "engine",
    *PATH_OF_ROLE.values(),
    "prompt_template",
    "ctx_size",
    "batch_size",
    "slots",
    "threads",
    "gpu_layers",
    "extra_args",
    "port",
)


def roles_served(config: ModelConfig, part: str) -> tuple[str, ...]:
    """The roles a process of this part has."""
    return config.roles if part == WHOLE else tuple(role for role in config.roles if role == part)


def slots_of(config: ModelConfig) -> int:
    """Requests one process serves at once: what is configured, as far as the engine can."""
    traits = TRAITS.get(config.engine)
    most = traits.max_slots if traits else None
    return config.slots if most is None else min(config.slots, most)


def launch_values(config: ModelConfig, part: str) -> dict[str, Any]:
    """Everything a process of this part depends on, without touching the file system: other nodes' files are not ours."""
    foreign = {PATH_OF_ROLE[role] for role in PATH_OF_ROLE if role not in roles_served(config, part)}
    values = {field: getattr(config, field) for field in LAUNCH_FIELDS if field not in foreign}
    return {**values, "slots": slots_of(config), "part": part}


def digest(config: ModelConfig, part: str) -> str:
    """SHA-256 of launch_values."""
    return digest_of(launch_values(config, part))


def digest_of(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What has changed between two launch_values, as phrases: “ctx_size 4096 → 8192”."""
    fields = sorted({*old, *new})
    return [f"{field} {old.get(field)} → {new.get(field)}" for field in fields if old.get(field) != new.get(field)]


def model_spec(config: ModelConfig, part: str) -> ModelSpec:
    """What the engine adapter gets for this part. Raises PathNotAllowed."""
    served = {PATH_OF_ROLE[role] for role in roles_served(config, part)}

    def path(field: str) -> Path | None:
        return resolve_model_path(getattr(config, field)) if field in served else None

    return ModelSpec(
        name=config.name,
        part=part,
        chat_model_path=path("chat_model_path"),
        embedding_model_path=path("embedding_model_path"),
        tts_model_path=path("tts_model_path"),
        prompt_template=config.prompt_template,
        ctx_size=config.ctx_size,
        batch_size=config.batch_size,
        slots=slots_of(config),
        threads=config.threads,
        gpu_layers=config.gpu_layers,
        extra_args=options.resolved(registry.options_of(config.engine), config.extra_args, resolve_model_path),
    )


def load_deadline_s(spec: ModelSpec) -> float:
    """Seconds a load may take: 5 minutes and 20 s per GiB of weights."""
    paths = (spec.chat_model_path, spec.embedding_model_path, spec.tts_model_path)
    weights = sum(path.stat().st_size for path in paths if path is not None)
    return 300.0 + 20.0 * weights / (1 << 30)
