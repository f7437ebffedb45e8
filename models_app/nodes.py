"""This machine among the nodes: its row, its heartbeat, and the tidying that only it can do. And how every node is doing."""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
from django.conf import settings
from django.utils import timezone

from models_app import coordination, incidents, provisioning, reconcile
from models_app.exceptions import CoordinationUnavailable
from models_app.models import Instance, Node
from models_app.process_identity import boot_id

log = logging.getLogger(__name__)

BEAT_LIFE_MS = 20_000  # heard for so long after a beat
ROW_EVERY = timedelta(seconds=60)
# A node silent for longer gets no more heartbeats asked of it; its worker speaks up by itself when it starts.
FORGOTTEN_AFTER = timedelta(minutes=15)


class NodeState(enum.StrEnum):
    """unknown: not heard for 20 s, which proves nothing about its processes; nothing of it is given up until it is fenced."""

    READY = "ready"
    CORDONED = "cordoned"
    UNKNOWN = "unknown"


def heard(nodes: Iterable[Node]) -> set[str]:
    """Names of those whose worker beats. Without Valkey nobody is heard."""
    try:
        return coordination.beating_nodes([node.name for node in nodes])
    except CoordinationUnavailable as error:
        log.debug("Every node is unknown: %s", error)
        return set()


def state_of(node: Node, heard_nodes: set[str]) -> NodeState:
    """How a node is doing; heard_nodes as heard() says."""
    if node.name not in heard_nodes:
        return NodeState.UNKNOWN
    return NodeState.CORDONED if node.cordoned else NodeState.READY


def heartbeat(name: str) -> bool:
    """Say that this node lives, in Valkey every time and in its row now and then. True where it is new or was restarted.

    A node that comes back from silence may have been fenced meanwhile: what it still runs of that ends before anything new
    is placed here.
    """
    if name not in coordination.beating_nodes([name]):
        provisioning.end_strays(name)
    coordination.node_beat(name, BEAT_LIFE_MS)
    now = timezone.now()
    node, created = Node.objects.get_or_create(name=name)
    news = created or node.boot_id != boot_id()
    if news or node.last_seen_at is None or now - node.last_seen_at >= ROW_EVERY:
        Node.objects.filter(pk=node.pk).update(
            boot_id=boot_id(),
            cpu_count=len(os.sched_getaffinity(0)),
            memory_bytes=psutil.virtual_memory().total,
            version=settings.VERSION,
            last_seen_at=now,
        )
    return news


def tidy(name: str) -> None:
    """End stray processes and delete old ended instances, old incidents and runtime folders that belong to nobody."""
    provisioning.end_strays(name)
    reconcile.prune(name)
    incidents.prune()
    remove_ownerless_folders()


def to_ask() -> list[str]:
    """Names of the nodes that periodic work is sent to: this one, and every other that was seen lately."""
    seen = Node.objects.filter(last_seen_at__gte=timezone.now() - FORGOTTEN_AFTER).values_list("name", flat=True)
    return sorted({settings.ASSISTANT_NODE, *seen})


# Folders of instances that have no row any more: their database was replaced, or the worker died while it pruned.


def remove_ownerless_folders() -> int:
    """Delete `<instance>/<generation>` folders of instances without a row, once no process lives in them; how many.

    Nothing else is touched: neither links nor anything whose name is not a number. Folders are listed before rows are
    asked for, and a row exists before its folder does, so a new instance's folder is never taken for ownerless.
    """
    found = {int(folder.name): folder for folder in _numbered(Path(settings.ASSISTANT_INSTANCES_DIR))}
    ownerless = found.keys() - set(Instance.objects.filter(pk__in=found).values_list("pk", flat=True))
    if not ownerless:
        return 0
    inhabited = {process.instance_id for process in provisioning.marked_processes()}
    return sum(_remove_runs(found[instance_id]) for instance_id in sorted(ownerless - inhabited))


def _remove_runs(folder: Path) -> int:
    removed = 0
    for run in list(_numbered(folder)):
        log.info("Removing %s: there is no such instance any more.", run)
        shutil.rmtree(run, ignore_errors=True)
        removed += not run.exists()
    with contextlib.suppress(OSError):  # something that is not ours lies in it
        folder.rmdir()
    return removed


def _numbered(folder: Path) -> Iterator[Path]:
    """Real folders in it whose names are numbers as we write them."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        name = entry.name
        if name.isascii() and name.isdigit() and str(int(name)) == name and entry.is_dir(follow_symlinks=False):
            yield Path(entry.path)
