"""What the gateway must know of an engine and of a model's parts, without knowing the engine. Pure: no Django, no I/O.

A model has roles: chat, embedding, speech, one for each model file. What one process serves is a *part* of the model: one of
its roles, or WHOLE, all of them, where the administrator wants them in one process and the engine can do that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
SPEECH = "/v1/audio/speech"

CHAT_ROLE = "chat"
EMBEDDING_ROLE = "embedding"
SPEECH_ROLE = "speech"
WHOLE = "whole"

ENDPOINTS: dict[str, frozenset[str]] = {
    CHAT_ROLE: frozenset({CHAT, COMPLETIONS}),
    EMBEDDING_ROLE: frozenset({EMBEDDINGS}),
    SPEECH_ROLE: frozenset({SPEECH}),
}


def roles_of(chat_path: str, embedding_path: str, speech_path: str) -> tuple[str, ...]:
    """The roles of a model with these paths; an empty path is none."""
    paths = ((CHAT_ROLE, chat_path), (EMBEDDING_ROLE, embedding_path), (SPEECH_ROLE, speech_path))
    return tuple(role for role, path in paths if path)


def parts_of(roles: tuple[str, ...], one_process: bool) -> tuple[str, ...]:
    """The processes one replica of a model with these roles consists of."""
    return (WHOLE,) if one_process and len(roles) > 1 else roles


def endpoints_of(part: str, roles: Iterable[str]) -> frozenset[str]:
    """What a process of this part answers, as far as the model goes: its engine may have fewer."""
    served = roles if part == WHOLE else (part,)
    return frozenset().union(*(ENDPOINTS.get(role, frozenset()) for role in served))


def part_for(endpoint: str, parts: Iterable[str]) -> str | None:
    """Which of a model's parts answers this endpoint; None where none does."""
    for part in parts:
        if part == WHOLE or endpoint in ENDPOINTS.get(part, frozenset()):
            return part
    return None


@dataclass(frozen=True, slots=True)
class EngineTraits:
    """Capabilities and quirks of an engine, registered by name.

    label: what an administrator reads.
    local: whether it is a process of ours, so that a ModelConfig may choose it.
    endpoints: paths under /v1 it serves well enough to be offered.
    cancel: "close" where closing the connection frees the slot, "none" where only its own end does.
    dialect: "openai" where bytes may be relayed as they come, else the name of the repairing relay.
    max_slots: requests one process can serve at once at most; None for any number.
    """

    name: str
    label: str
    endpoints: frozenset[str]
    local: bool = True
    cancel: Literal["close", "none"] = "close"
    dialect: Literal["openai", "llama-api-server"] = "openai"
    max_slots: int | None = None


TRAITS: dict[str, EngineTraits] = {
    "embedded": EngineTraits("embedded", "Embedded llama.cpp (pip only)", frozenset({CHAT, COMPLETIONS, EMBEDDINGS})),
    "llama-server": EngineTraits("llama-server", "llama-server (native llama.cpp)", frozenset({CHAT, COMPLETIONS, EMBEDDINGS})),
    "wasmedge": EngineTraits(
        "wasmedge",
        "WasmEdge (LlamaEdge, sandboxed)",
        frozenset({CHAT, COMPLETIONS, EMBEDDINGS, SPEECH}),
        cancel="none",
        dialect="llama-api-server",
        max_slots=1,
    ),
    # Whatever stands behind a remote server of kind "openai" speaks for itself.
    "openai": EngineTraits("openai", "OpenAI-compatible server", frozenset({CHAT, COMPLETIONS, EMBEDDINGS}), local=False),
}


def engine_choices() -> list[tuple[str, str]]:
    """(name, label) of every engine a ModelConfig may choose."""
    return [(traits.name, traits.label) for traits in TRAITS.values() if traits.local]
