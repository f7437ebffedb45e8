"""What the control plane last said of loads under way, for whoever waits for one. No Django, no I/O.

Fed by the control link as it was read; nothing is parsed until somebody is told, and what is older than LOAD_LIFE_S says nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from models_app.contracts.coordination import LOAD_LIFE_S, LoadProgress, load_field


class Loads:
    """The hash LOADS as of the last look."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._fields: Mapping[bytes, bytes] = {}

    def take_over(self, fields: Mapping[bytes, bytes]) -> None:
        """Everything there is now; what was there before is forgotten."""
        self._fields = fields

    def find(self, name: str, part: str) -> LoadProgress | None:
        """How the load of this part is getting on; None where none is known."""
        text = self._fields.get(load_field(name, part).encode())
        progress = None if text is None else _parsed(text)
        return progress if progress is not None and self._clock() - progress["at"] <= LOAD_LIFE_S else None


def _parsed(text: bytes) -> LoadProgress | None:
    """None for what this version cannot read: a scheduler of another version may write while we are upgraded."""
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("state") not in ("waiting", "loading"):
        return None
    at, eta_s, detail = _number(found.get("at")), _number(found.get("eta_s")), found.get("detail")
    return {
        "state": found["state"],
        "progress": min(1.0, max(0.0, _number(found.get("progress")) or 0.0)),
        "eta_s": None if eta_s is None else max(0.0, eta_s),
        "detail": detail if isinstance(detail, str) else "",
        "at": at or 0.0,
    }


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
