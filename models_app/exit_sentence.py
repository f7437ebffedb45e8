"""One sentence on how an engine ended, from its exit record. Pure."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

from models_app.shim import ExitRecord


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended, or why none could be started. reason is a sentence for the administrator."""

    reason: str
    log: str = ""
    code: int | None = None
    signal: int | None = None
    peak_memory_bytes: int | None = None
    diagnosis: str = ""
    remedy: str = ""


def from_record(record: ExitRecord) -> Exit:
    """What the administrator reads of an engine that ended by itself or was ended."""
    lines = record["lines"]
    number = record["signal"]
    reason = _by_signal(number, record["oom_kills"]) if number is not None else _by_code(record["code"] or 0, lines)
    return Exit(reason, "\n".join(lines), record["code"], number, record["peak_memory_bytes"])


def without_record(lines: list[str]) -> Exit:
    """The shim could not write a record: it was killed itself, or the machine restarted."""
    return Exit(
        "The engine ended together with its shim, which was killed or lost in a restart of the machine.", "\n".join(lines)
    )


def _by_signal(number: int, oom_kills: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL and oom_kills:
        return "The engine was killed by the kernel for want of memory; lower ctx_size or slots, or use a smaller model."
    if number == signal.SIGKILL:
        return "The engine was killed (SIGKILL) by somebody outside this platform."
    if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL):
        return f"The engine crashed ({name}); see its last lines."
    return f"The engine was ended by {name}."


# llama.cpp's log lines: time since the start, level, component, function, text.
_ERROR_LINE = re.compile(r"^[\d.]+ E (?:\w+\s+)?(?:\S+: )?(?P<text>.+)$")


def _by_code(code: int, lines: list[str]) -> str:
    """The loader's own error says why, what stands around it only that it was given up; without any error, the last line."""
    errors = list(filter(None, map(_ERROR_LINE.match, lines)))
    found = next((error for error in errors if error["text"].startswith("error loading model")), errors[0] if errors else None)
    said = found["text"].strip() if found else next((line.strip() for line in reversed(lines) if line.strip()), "")
    tail = f": {said[:300]}" if said else " without a word."
    return f"The engine ended with exit code {code}{tail}"
