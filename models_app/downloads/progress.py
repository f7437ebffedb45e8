"""What a fetch tells while it works."""

from __future__ import annotations

import enum
from typing import Protocol


class Phase(enum.StrEnum):
    """What a fetch is doing."""

    WAITING = "waiting"  # another fetch has this target
    DOWNLOADING = "downloading"
    EXTRACTING = "extracting"
    COPYING = "copying"
    VERIFYING = "verifying"


class Progress(Protocol):
    """Told often: bytes done and in all (None: not known) of this phase. Whatever it raises ends the fetch cleanly."""

    def __call__(self, done: int, total: int | None, phase: Phase, /) -> None: ...


def silent(done: int, total: int | None, phase: Phase, /) -> None:
    """Progress that nobody wants to see."""
