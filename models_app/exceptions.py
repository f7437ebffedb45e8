"""Every error the control plane raises on purpose. Each message is one sentence an administrator can act on."""

from __future__ import annotations


class AssistantError(Exception):
    """Base of all; str() is a sentence with the remedy."""


class StaleTransition(AssistantError):
    """The instance was no longer in the expected state or generation, so nothing was changed."""


class PreflightError(AssistantError):
    """The engine cannot start here; the message says what is missing and what to do."""


class PathNotAllowed(PreflightError):
    """A model path does not exist or resolves outside ASSISTANT_MODEL_DIRS."""


class NotAModel(PreflightError):
    """The file is no GGUF model, whatever its name says."""


class TruncatedModel(PreflightError):
    """The model file, or one of its parts, is not there to its end."""


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
