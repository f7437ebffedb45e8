"""What the gateway must know of an engine, without knowing the engine. Pure: no Django, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"


@dataclass(frozen=True, slots=True)
class EngineTraits:
    """Capabilities and quirks of an engine, registered by name.

    label: what an administrator reads.
    local: whether it is a process of ours, so that a ModelConfig may choose it.
    endpoints: paths under /v1 it serves well enough to be offered.
    cancel: "close" where closing the connection frees the slot, "none" where only its own end does.
    dialect: "openai" where bytes may be relayed as they come, else the name of the repairing relay.
    """

    name: str
    label: str
    endpoints: frozenset[str]
    local: bool = True
    cancel: Literal["close", "none"] = "close"
    dialect: Literal["openai", "llama-api-server"] = "openai"


TRAITS: dict[str, EngineTraits] = {
    "embedded": EngineTraits("embedded", "Embedded llama.cpp (pip only)", frozenset({CHAT, COMPLETIONS})),
    # Whatever stands behind a remote server of kind "openai" speaks for itself.
    "openai": EngineTraits("openai", "OpenAI-compatible server", frozenset({CHAT, COMPLETIONS, EMBEDDINGS}), local=False),
}


def engine_choices() -> list[tuple[str, str]]:
    """(name, label) of every engine a ModelConfig may choose."""
    return [(traits.name, traits.label) for traits in TRAITS.values() if traits.local]
