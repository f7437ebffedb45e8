"""What a process of llama.cpp's server serves and with which sizes: one file, as a chat model or as an embedding model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models_app.contracts.traits import CHAT_ROLE, EMBEDDING_ROLE, SPEECH_ROLE
from models_app.engines import gguf
from models_app.engines.base import ModelSpec
from models_app.exceptions import PreflightError

# extra_args belong to all parts of a model; these to one kind of process alone, and are left out of the other's.
POOLING = "pooling_type"
EMBEDDING_ONLY = frozenset({POOLING, "attention_type", "embd_normalize"})
CHAT_ONLY = ("sampling.", "speculative", "draft_", "mmproj", "lora", "reasoning", "image_", "chat_", "n_ubatch")  # beginnings

# llama.cpp's numbers of poolings (llama_pooling_type). Without a pooling /v1/embeddings has nothing to answer, and a
# reranker's one number is no embedding.
_NO_POOLING, _RANK = 0, 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """All in tokens; context and batch are what the whole process is launched with."""

    context: int
    slot_context: int
    batch: int
    micro_batch: int | None  # None: the engine's own


@dataclass(frozen=True, slots=True)
class Served:
    """What the process is launched for. pooling: empty where the model file itself says it."""

    path: Path
    embedding: bool
    sizes: Sizes
    pooling: str
    extra_args: dict[str, Any]


def served(model: ModelSpec) -> Served:
    """What this part of the model makes of a process. Raises PreflightError where llama.cpp's server cannot do it."""
    if model.part not in (CHAT_ROLE, EMBEDDING_ROLE):
        raise PreflightError(_cannot(model.part))
    embedding = model.part == EMBEDDING_ROLE
    path = model.embedding_model_path if embedding else model.chat_model_path
    if path is None:
        raise PreflightError(f"The engine needs {model.part}_model_path; choose a model file.")
    header = gguf.read_header(path)
    return Served(
        path=path,
        embedding=embedding,
        sizes=_embedding_sizes(model, header.context_length) if embedding else _chat_sizes(model),
        pooling=_pooling(path, header.pooling_type, model.extra_args.get(POOLING, "auto")) if embedding else "",
        extra_args=_for_part(model.extra_args, embedding),
    )


def check_files(extra_args: Mapping[str, Any]) -> None:
    """Raise PreflightError unless every further file that is named is a whole GGUF file."""
    paths = [extra_args[name] for name in ("mmproj", "draft_model") if name in extra_args]
    for path in [*paths, *(one["path"] for one in extra_args.get("lora", []))]:
        gguf.check(Path(path))


def _cannot(part: str) -> str:
    if part == SPEECH_ROLE:
        return "llama.cpp's server does not speak; leave tts_model_path empty, or choose the engine wasmedge."
    return "llama.cpp's server serves one model file in a process; switch one_process off, so that each file gets its own."


def _chat_sizes(model: ModelSpec) -> Sizes:
    return Sizes(model.ctx_size * model.slots, model.ctx_size, model.batch_size, None)


def _embedding_sizes(model: ModelSpec, trained: int) -> Sizes:
    """No longer than the model was trained for: past that its positions mean nothing. An input is computed in one piece,
    so the batch must hold the longest."""
    length = min(model.ctx_size, trained) if trained else model.ctx_size
    return Sizes(length * model.slots, length, length, length)


def _pooling(path: Path, in_file: int | None, wanted: str) -> str:
    """How an embedding model's vectors become one. A file that does not say is a chat model: the mean serves it."""
    if wanted != "auto":
        return wanted
    if in_file == _RANK:
        raise PreflightError(f"{path} is a reranker, which gives no embeddings; choose an embedding model.")
    return "mean" if in_file in (None, _NO_POOLING) else ""


def _for_part(values: Mapping[str, Any], embedding: bool) -> dict[str, Any]:
    """What of extra_args concerns this kind of process; the pooling has been decided already."""
    if not embedding:
        return {name: value for name, value in values.items() if name not in EMBEDDING_ONLY}
    return {name: value for name, value in values.items() if name != POOLING and not name.startswith(CHAT_ONLY)}
