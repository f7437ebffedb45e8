"""Gateways alive, and what they have written down but nobody has taken over yet."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from django.conf import settings

from models_app import coordination
from models_app.contracts.spool import CLOSED_SUFFIX, FILE_NAME
from models_app.doctor.finding import Context, Finding, fail, ok, warn

OLD_S = 120.0
LARGE = 256 * 1024 * 1024


def check_alive(context: Context) -> Iterable[Finding]:
    told = coordination.telemetry()
    yield judge_alive([f"{gateway['gateway']} on node {gateway['node']}" for gateway in told], context)


def judge_alive(names: Sequence[str], context: Context) -> Finding:
    if not names:
        return context.absent("No gateway says anything.", "See logs/gateway.log under ASSISTANT_HOME.")
    return ok(f"{len(names)} gateway{'' if len(names) == 1 else 's'} alive: {', '.join(names)}.")


def check_spool(context: Context) -> Iterable[Finding]:
    folder = Path(settings.ASSISTANT_SPOOL_DIR)
    try:
        entries = [(entry.name, entry.stat()) for entry in os.scandir(folder) if FILE_NAME.fullmatch(entry.name)]
    except FileNotFoundError:
        yield ok("No usage has been written down yet.")
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        yield fail(f"{folder} cannot be written, so usage is lost.", "Mend its owner and mode (700).")
    ages = [time.time() - status.st_mtime for name, status in entries if name.endswith(CLOSED_SUFFIX)]
    yield judge_spool(len(entries), sum(status.st_size for _, status in entries), max(ages, default=0.0))


def judge_spool(files: int, size: int, oldest_s: float) -> Finding:
    """oldest_s: for how long the oldest finished file has been waiting."""
    if oldest_s > OLD_S or size > LARGE:
        return warn(
            f"{files} files with {size / (1 << 20):.1f} MiB of usage wait to be taken over, the oldest for {oldest_s:.0f} s.",
            "See logs/bulk.log under ASSISTANT_HOME: its worker takes them over.",
        )
    return ok("Usage is taken over as it comes.")
