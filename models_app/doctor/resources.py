"""Disk and memory that are left."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from django.conf import settings

from models_app import node_memory
from models_app.doctor.database import sqlite_file
from models_app.doctor.finding import Context, Finding, fail, ok, warn
from models_app.node_memory import HostMemory

GIB = 1 << 30
DISK_FAIL = GIB // 4
DISK_WARN = 2 * GIB
INODES_WARN = 0.02
MEMORY_WARN = GIB // 2


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
    yield judge_memory(node_memory.host_memory())
    for gpu in node_memory.gpus():
        yield ok(f"{gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB are free on GPU {gpu.index}, {gpu.name}.")


def judge_memory(memory: HostMemory) -> Finding:
    where = "" if memory.group_limit is None else " in this container"
    told = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB of memory are free{where}"
    if memory.available < MEMORY_WARN:
        return warn(f"Only {told}.", "Stop something, or serve smaller models: new ones may not fit.")
    return ok(f"{told}.")
