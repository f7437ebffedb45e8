"""Sizes and times as sentences about memory write them. Pure."""

from __future__ import annotations

MIB = 1 << 20
GIB = 1 << 30


def size_text(count: int) -> str:
    """“1.4 GiB”, “312 MiB”."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def idle_text(seconds: float) -> str:
    """“idle 40 s”, “idle 4 min”, “idle 3 h”."""
    if seconds < 60:
        return f"idle {seconds:.0f} s"
    return f"idle {seconds / 60:.0f} min" if seconds < 5400 else f"idle {seconds / 3600:.0f} h"
