"""Every error the control plane raises on purpose. Each message is one sentence an administrator can act on."""

from __future__ import annotations

from typing import ClassVar

from models_app.contracts.diagnoses import Code


class AssistantError(Exception):
    """Base of all; str() is a sentence with the remedy."""


class StaleTransition(AssistantError):
    """The instance was no longer in the expected state or generation, so nothing was changed."""


class PreflightError(AssistantError):
    """The engine cannot start here; the message says what is missing and what to do.

    diagnosis: the kind of refusal, as an instance and its incident show it (models_app/contracts/diagnoses.py); one of LASTING.
    """

    diagnosis: ClassVar[Code] = Code.PREFLIGHT


class MissingProgram(PreflightError):
    """The engine's program is not here or cannot be run."""

    diagnosis = Code.MISSING_PROGRAM


class MissingLibrary(PreflightError):
    """The engine's program needs a library that is not here."""

    diagnosis = Code.MISSING_LIBRARY


class MissingPlugin(PreflightError):
    """WasmEdge has no wasi_nn-ggml plugin, or cannot load it."""

    diagnosis = Code.MISSING_PLUGIN


class UnknownImport(PreflightError):
    """The wasm file and WasmEdge do not fit together."""

    diagnosis = Code.UNKNOWN_IMPORT


class PathNotAllowed(PreflightError):
    """A model path does not exist or resolves outside ASSISTANT_MODEL_DIRS."""


class NotAModel(PreflightError):
    """The file is no GGUF model, whatever its name says."""

    diagnosis = Code.NOT_A_MODEL


class TruncatedModel(PreflightError):
    """The model file, or one of its parts, is not there to its end."""

    diagnosis = Code.TRUNCATED_MODEL


class SpawnError(AssistantError):
    """The shim could not be started or never reported."""


class NoNode(AssistantError):
    """No node's worker is heard, so a new instance could be placed nowhere."""


class NodeInUse(AssistantError):
    """A node that is heard or has instances can be neither fenced nor deleted."""


class DownloadError(AssistantError):
    """A file could not be fetched or did not match its checksum; nothing half-done is left under its name."""


class CatalogError(AssistantError):
    """A catalogue file is wrong; the message names file, entry and key."""


class SecretUnreadable(AssistantError):
    """A secret at rest was written under another secret key."""


class CoordinationUnavailable(AssistantError):
    """Valkey or Redis does not answer."""
