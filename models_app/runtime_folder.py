"""What lies in an instance's runtime folder, ASSISTANT_HOME/instances/<id>/<generation>/, and how the shim is started on it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from django.conf import settings

from models_app import shim
from models_app.engines.base import Command
from models_app.engines.environment import engine_environment
from models_app.exceptions import SpawnError
from models_app.process_identity import ProcessIdentity

SHIM = Path(shim.__file__)
MOVED = "moved.json"  # when a loading engine was last seen to move, and what it was like then
REPORT_S = 2.0  # how long a shim may take to report
MARK = "ASSISTANT_INSTANCE"  # "<id>:<generation>" in the environment of every shim and engine
FOLDER_MARK = "ASSISTANT_RUNTIME"  # their runtime folder: tells this installation's processes from another's


@dataclass(frozen=True, slots=True)
class Pair:
    """Who shim and engine of one run are."""

    shim: ProcessIdentity
    engine: ProcessIdentity


def path(instance_id: int, generation: int) -> Path:
    return Path(settings.ASSISTANT_INSTANCES_DIR) / str(instance_id) / str(generation)


def prepare(folder: Path, command: Command) -> None:
    """Make the folder (0700) with the engine's files and the shim's launch file (0600).

    Nothing that lies there already is this run's: a database that was made anew counts its instances from 1 again.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    launch: shim.LaunchFile = {
        "argv": command.argv,
        "grace_s": settings.ASSISTANT_ENGINE_TERM_S,
        "log_bytes": settings.ASSISTANT_ENGINE_LOG_BYTES,
    }
    for name, text in {**command.files, shim.LAUNCH: json.dumps(launch)}.items():
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)


def spawn(folder: Path, instance_id: int, generation: int, env: Mapping[str, str]) -> Pair | None:
    """Start the detached shim, which starts the engine, and say who they are; None where it has not reported yet.

    Raises SpawnError where it says that it cannot.
    """
    environment = {
        **engine_environment(os.environ),
        **env,
        MARK: f"{instance_id}:{generation}",
        FOLDER_MARK: str(folder),
    }
    argv = [sys.executable, "-I", "-S", str(SHIM), str(folder)]
    with subprocess.Popen(
        argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder
    ) as starter:
        assert starter.stdout is not None
        heard, _, _ = select.select([starter.stdout], [], [], REPORT_S)
        report = os.read(starter.stdout.fileno(), 4096) if heard else None
    if report not in (None, shim.OK):
        why = report.decode(errors="replace").strip() if report else "it ended without a word"
        raise SpawnError(f"its shim failed: {why}; see {folder / 'shim.log'}.")
    return read_identity(folder)


def read_identity(folder: Path) -> Pair | None:
    """Who the shim of this folder said they are, None where it has not said so."""
    try:
        said = cast(shim.IdentityFile, json.loads((folder / shim.IDENTITY).read_text()))
    except (OSError, ValueError):
        return None
    return Pair(
        shim=ProcessIdentity(said["boot_id"], said["shim_pid"], said["shim_start_ticks"]),
        engine=ProcessIdentity(said["boot_id"], said["engine_pid"], said["engine_start_ticks"]),
    )


def read_exit(folder: Path) -> shim.ExitRecord | None:
    """The exit record of this run, None where the engine has not ended or the shim was killed first."""
    try:
        return cast(shim.ExitRecord, json.loads((folder / shim.EXIT).read_text()))
    except (OSError, ValueError):
        return None


def last_log_lines(folder: Path, count: int) -> list[str]:
    """The end of a run's log, also while it runs."""
    for name in (shim.LOG + ".tail", shim.LOG):
        with contextlib.suppress(OSError), (folder / name).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 65536))
            if lines := file.read().decode("utf-8", "replace").splitlines():
                return lines[-count:]
    return []


def still_s(folder: Path, memory_bytes: int, moved_bytes: int) -> float:
    """For how long neither the log nor the process's memory has moved, over calls of this; 0 at the first one.

    What was seen last lies in the folder, so whoever looks next goes on from there. Kept on the clock that counts since
    boot, for the time of day may be set.
    """
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    written = max((file.stat().st_mtime_ns for file in folder.glob(shim.LOG + "*")), default=0)
    try:
        then, written_then, memory_then = json.loads((folder / MOVED).read_text())
        if written == written_then and abs(memory_bytes - memory_then) < moved_bytes:
            return max(0.0, now - float(then))
    except (OSError, ValueError, TypeError):
        pass
    with contextlib.suppress(OSError):  # gone, or the disk is full: then it counts as moving until the longest deadline
        shim.write_json(folder / MOVED, [now, written, memory_bytes])
    return 0.0


def remove(instance_id: int) -> None:
    """Delete every run's folder of an instance that has ended."""
    shutil.rmtree(Path(settings.ASSISTANT_INSTANCES_DIR) / str(instance_id), ignore_errors=True)
