"""Disk and memory that are left."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import psutil
from django.conf import settings

from models_app.doctor.database import sqlite_file
from models_app.doctor.finding import Context, Finding, fail, ok, warn

GIB = 1 << 30
DISK_FAIL = GIB // 4
DISK_WARN = 2 * GIB
INODES_WARN = 0.02
MEMORY_WARN = GIB // 2
CGROUP = Path("/sys/fs/cgroup")


def check_disk(context: Context) -> Iterable[Finding]:
    places = {"home": Path(settings.ASSISTANT_HOME), **{f"models {folder}": folder for folder in settings.ASSISTANT_MODEL_DIRS}}
    if (database := sqlite_file()) is not None:
        places["database"] = database.parent
    for names, path in _by_disk(places):
        disk = os.statvfs(path)
        inodes = disk.f_favail / disk.f_files if disk.f_files else 1.0
        yield judge_disk(names, disk.f_bavail * disk.f_frsize, inodes)


def _by_disk(places: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """(what lies on it, a folder there) of each disk; folders that are not there yet are not asked."""
    disks: dict[int, tuple[list[str], Path]] = {}
    for name, path in places.items():
        if path.is_dir():
            disks.setdefault(path.stat().st_dev, ([], path))[0].append(name)
    for names, path in disks.values():
        yield ", ".join(names), path


def judge_disk(what: str, free: int, inodes: float) -> Finding:
    """inodes: the share that is free."""
    told = f"{free / GIB:.1f} GiB are free for: {what}"
    if free < DISK_FAIL:
        return fail(f"Only {told}.", "Free some before the database and logs cannot be written.")
    if free < DISK_WARN:
        return warn(f"Only {told}.", "Free some; a model file alone may be larger.")
    if inodes < INODES_WARN:
        return warn(f"{told}, but hardly any inodes.", "Remove many small files.")
    return ok(f"{told}.")


def check_memory(context: Context) -> Iterable[Finding]:
    memory = psutil.virtual_memory()
    limit, used = _cgroup()
    yield judge_memory(memory.total, memory.available, limit, used)


def _cgroup() -> tuple[int | None, int]:
    """(limit, what counts against it and could not be given back) in bytes; no limit where none is set or told."""
    try:
        raw = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        facts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None, 0
    return (None if raw == "max" else int(raw)), used - int(facts.get("inactive_file", 0))


def judge_memory(total: int, available: int, limit: int | None, used: int) -> Finding:
    left = available if limit is None else max(0, min(available, limit - used))
    bound = total if limit is None else min(total, limit)
    told = f"{left / GIB:.1f} of {bound / GIB:.1f} GiB of memory are free{'' if limit is None else ' in this container'}"
    if left < MEMORY_WARN:
        return warn(f"Only {told}.", "Stop something, or serve smaller models: new ones may not fit.")
    return ok(f"{told}.")
