"""Processes of this installation, found by their mark, and among them those that no instance accounts for."""

from __future__ import annotations

import logging
import signal
from dataclasses import dataclass
from pathlib import Path

import psutil
from django.conf import settings

from models_app import runtime_folder
from models_app.models import Instance
from models_app.process_identity import ProcessIdentity, identify, send

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stray:
    """A shim or engine of this installation that no current instance accounts for."""

    process: ProcessIdentity
    instance_id: int
    generation: int


def marked_processes() -> list[Stray]:
    """Every living process with this installation's mark in its environment."""
    base = Path(settings.ASSISTANT_INSTANCES_DIR)
    found = []
    for pid in psutil.pids():
        identity = identify(pid)
        try:
            environment = dict(
                part.split("=", 1) for part in Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0") if "=" in part
            )
        except OSError:
            continue
        mark, folder = environment.get(runtime_folder.MARK, ""), environment.get(runtime_folder.FOLDER_MARK, "")
        instance_id, _, generation = mark.partition(":")
        if identity and instance_id.isdigit() and generation.isdigit() and folder and Path(folder).is_relative_to(base):
            found.append(Stray(identity, int(instance_id), int(generation)))
    return found


def find_strays(node_name: str) -> list[Stray]:
    """Marked processes that belong to no instance of this node in its present generation and a state with a process.

    Processes are listed before the database is asked: a row exists before its process does, so a new one is never a stray.
    """
    marked = marked_processes()
    rows = Instance.objects.with_process().filter(node__name=node_name).values_list("pk", "generation")
    expected = set(rows) if marked else set()
    return [one for one in marked if (one.instance_id, one.generation) not in expected]


def end_strays(node_name: str) -> int:
    """Kill what find_strays finds; how many there were."""
    strays = find_strays(node_name)
    for stray in strays:
        log.warning("Ending stray process %d of instance %d:%d", stray.process.pid, stray.instance_id, stray.generation)
        send(stray.process, signal.SIGKILL)
    return len(strays)
