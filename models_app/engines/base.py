"""What an engine adapter is. Adapters see these dataclasses, never the ORM.

An adapter knows four things and nothing else: preflight (can it run here), command (what to launch), probe (what the
process says of itself) and, by name in models_app/contracts/traits.py, its traits.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import httpx


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A ModelConfig as an engine sees it. Paths are resolved and allowed already; None where not given."""

    name: str
    part: str  # what this process serves: chat, embedding, speech, or whole; paths of other parts are None
    chat_model_path: Path | None
    embedding_model_path: Path | None
    tts_model_path: Path | None
    prompt_template: str
    ctx_size: int  # tokens one request may use; a process is launched with ctx_size × slots
    batch_size: int
    slots: int
    threads: int  # 0: the engine chooses
    gpu_layers: int  # -1: all
    extra_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Where this node has its engines. Programs are names looked up on PATH, or absolute paths."""

    wasmedge: str
    wasm_file: Path
    wasm_sha256: str  # empty: nothing is pinned
    llama_server: str


@dataclass(frozen=True, slots=True)
class Launch:
    """One process to be started."""

    model: ModelSpec
    instance_id: int
    generation: int
    port: int
    secret: str  # the API key this engine must demand
    folder: Path  # its runtime folder, ASSISTANT_HOME/instances/<id>/<generation>


@dataclass(frozen=True, slots=True)
class Command:
    """What the shim starts: argv (never a shell string), extra environment, and 0600 files to write into the folder."""

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


class Health(enum.StrEnum):
    """What one probe learned."""

    LOADING = "loading"
    READY = "ready"
    BUSY = "busy"  # no answer in time; while it generates that is no failure
    WRONG_SERVER = "wrong_server"  # something else answers on this port
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class Probe:
    """Result of one probe. Where the engine tells: slots_busy, slots (how many requests it really serves at once), and work,
    a text that changes whenever its work gets on.
    """

    health: Health
    detail: str = ""
    slots_busy: int | None = None
    slots: int | None = None
    work: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a running engine answers. proven: this very process was READY before, so who answers need not be proven again."""

    host: str
    port: int
    secret: str
    model_name: str
    proven: bool = False


class EngineAdapter(Protocol):
    """One engine. Cheap to make and stateless: an adapter object may serve any number of instances."""

    name: str

    def preflight(self, model: ModelSpec) -> None:
        """Raise PreflightError with a one-line remedy where this model cannot start here."""

    def command(self, launch: Launch) -> Command:
        """The process to start. Secrets go into files, never into argv."""

    def probe(self, target: Target, client: httpx.Client) -> Probe:
        """Ask the process. READY needs a keyed endpoint to answer 200 with the key and 401 without."""


@runtime_checkable
class Installable(Protocol):
    """An adapter that can say, without a model, whether its engine is on this node."""

    def installed(self) -> str:
        """What there is and its version, in words. Raises PreflightError with the remedy for the first thing missing."""
