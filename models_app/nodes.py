"""This machine among the nodes: its row, its heartbeat, and the tidying that only it can do."""

from __future__ import annotations

import os
from datetime import timedelta

import psutil
from django.conf import settings
from django.utils import timezone

from models_app import coordination, provisioning, reconcile
from models_app.models import Node
from models_app.process_identity import boot_id

BEAT_LIFE_MS = 20_000  # heard for so long after a beat
ROW_EVERY = timedelta(seconds=60)
# A node silent for longer gets no more heartbeats asked of it; its worker speaks up by itself when it starts.
FORGOTTEN_AFTER = timedelta(minutes=15)


def heartbeat(name: str) -> bool:
    """Say that this node lives, in Valkey every time and in its row now and then. True where it is new or was restarted."""
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
    """End stray processes and delete old ended instances with their folders."""
    provisioning.end_strays(name)
    reconcile.prune(name)


def to_ask() -> list[str]:
    """Names of the nodes that periodic work is sent to: this one, and every other that was seen lately."""
    seen = Node.objects.filter(last_seen_at__gte=timezone.now() - FORGOTTEN_AFTER).values_list("name", flat=True)
    return sorted({settings.ASSISTANT_NODE, *seen})
