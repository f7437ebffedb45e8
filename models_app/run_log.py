"""Read an engine's log of one run, never anything else: what the admin shows. Files are the shim's (models_app/shim.py).

A run's log is engine.log (its beginning), engine.log.tail.1 (older end) and engine.log.tail (newer end), in that order.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from django.conf import settings

LOG_FILES = ("engine.log.tail", "engine.log.tail.1", "engine.log")  # newest first
MAX_LINES = 5000
MAX_BYTES = 1024 * 1024  # of a page, whatever the lines


@dataclass(frozen=True, slots=True)
class LogTail:
    """The last lines of a run. found: whether this node has a log of it; cut: whether earlier lines exist."""

    lines: list[str]
    found: bool
    cut: bool = False


def runs(instance_id: int) -> list[int]:
    """Generations of which this node has a folder, newest first."""
    folder = Path(settings.ASSISTANT_INSTANCES_DIR) / str(int(instance_id))
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)


def tail(instance_id: int, generation: int, lines: int) -> LogTail:
    """At most so many last lines. Both ids are numbers, so no path but a run's can come out; links are not followed."""
    folder = Path(settings.ASSISTANT_INSTANCES_DIR) / str(int(instance_id)) / str(int(generation))
    lines = max(1, min(lines, MAX_LINES))
    text, found, cut = b"", False, False
    for name in LOG_FILES:
        piece = _end_of(folder / name, MAX_BYTES - len(text))
        if piece is None:
            continue
        found = True
        data, piece_cut = piece
        text, cut = data + text, cut or piece_cut
        if cut or text.count(b"\n") > lines:
            break
    split = text.decode("utf-8", "replace").splitlines()
    if cut and split:
        split = split[1:]  # its beginning is missing
    return LogTail(split[-lines:], found, cut or len(split) > lines)


def _end_of(file: Path, budget: int) -> tuple[bytes, bool] | None:
    """The last bytes of a file and whether that is less than all of it; None where there is no such file."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as handle:
        size = os.fstat(descriptor).st_size
        handle.seek(max(0, size - budget))
        return handle.read(budget), size > budget
