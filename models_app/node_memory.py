"""What memory this machine has and would still give: the kernel, the control group this process lives in, and the GPUs.

Engines inherit the worker's control group, so its limit is theirs. File pages count as available everywhere, for the kernel gives
them back on demand; models_app/admission.py takes off what engines have mapped.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

MIB = 1 << 20
GPU_TIMEOUT_S = 2.0
GPU_FRESH_S = 3.0  # asking takes some 50 ms and wakes a sleeping card
NO_LIMIT = 1 << 60  # what control groups v1 say where there is none is near 2**63


@dataclass(frozen=True, slots=True)
class HostMemory:
    """total: the machine's, or its control group's where that is less. group_limit: None where no group limits us."""

    total: int
    available: int
    group_limit: int | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card, in bytes."""

    index: int
    name: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class GroupFiles:
    """Where a control group tells its limit and use; the two versions of the interface name them differently."""

    limit: str
    use: str
    reclaimable: tuple[str, ...]  # keys of memory.stat


V1 = GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
V2 = GroupFiles("memory.max", "memory.current", ("active_file", "inactive_file"))


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Host memory as this process may use it; root: where proc and sys are."""
    kernel = psutil.virtual_memory()
    total, available, limit = kernel.total, kernel.available, None
    for group_limit, group_available in _groups(root):
        limit = group_limit if limit is None else min(limit, group_limit)
        available = min(available, group_available)
    return HostMemory(min(total, limit) if limit is not None else total, max(0, available), limit)


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, what is left of it) of every limited group we are in, our own and those around it."""
    for folder, top, names in _group_folders(root):
        while True:
            if found := _read_group(folder, names):
                yield found
            if folder == top:
                break
            folder = folder.parent


def _group_folders(root: Path) -> Iterator[tuple[Path, Path, GroupFiles]]:
    """(our group's folder, the hierarchy's top, its file names) for each memory hierarchy."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", V2
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", V1
        else:
            continue
        folder = top / path.lstrip("/")
        # In a container the path is often the host's view; what is mounted is then our own group.
        yield (folder if folder.is_relative_to(top) and ".." not in folder.parts and folder.is_dir() else top), top, names


def _read_group(folder: Path, names: GroupFiles) -> tuple[int, int] | None:
    """(limit, limit − use + reclaimable) of one group, None where it has no limit."""
    try:
        limit = (folder / names.limit).read_text().strip()
        if limit == "max" or int(limit) >= NO_LIMIT:
            return None
        use = int((folder / names.use).read_text())
        stat = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
        reclaimable = sum(int(stat.get(key, 0)) for key in names.reclaimable)
    except (OSError, ValueError):
        return None
    return int(limit), max(0, int(limit) - use + reclaimable)


_gpus_at: tuple[float, list[Gpu]] | None = None


def gpus() -> list[Gpu]:
    """NVIDIA cards; none where nvidia-smi is missing, fails or hangs. Asked every few seconds at most."""
    global _gpus_at  # one answer per process, whoever asks
    now = time.monotonic()
    if _gpus_at is None or now - _gpus_at[0] >= GPU_FRESH_S:
        _gpus_at = (now, [Gpu(int(row[0]), row[1], int(row[2]) * MIB, int(row[3]) * MIB) for row in _ask_gpus()])
    return _gpus_at[1]


def forget_gpus() -> None:
    """Ask again next time."""
    global _gpus_at
    _gpus_at = None


def gpu_bytes_by_pid() -> dict[int, int]:
    """GPU memory of each process that uses any, on all cards together."""
    found: dict[int, int] = {}
    for pid, mib in _query("--query-compute-apps=pid,used_memory", 2):
        if pid.isdigit() and mib.isdigit():  # “[N/A]” where the driver does not tell
            found[int(pid)] = found.get(int(pid), 0) + int(mib) * MIB
    return found


def _ask_gpus() -> list[list[str]]:
    rows = _query("--query-gpu=index,name,memory.total,memory.free", 4)
    return [row for row in rows if row[0].isdigit() and row[2].isdigit() and row[3].isdigit()]


def _query(query: str, columns: int) -> list[list[str]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=GPU_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    rows = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    return [[cell.strip() for cell in row] for row in rows if len(row) == columns]
