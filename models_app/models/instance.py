"""One engine process and its state. models_app/lifecycle.py is the only writer of `state`."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.db.models import Q
from django.db.models.functions import Now

from models_app.models.model_config import ModelConfig
from models_app.models.node import Node
from models_app.models.revision import Revisioned


class State(models.TextChoices):
    """PENDING → STARTING → READY → DRAINING → STOPPING → STOPPED; FAILED → STARTING … → CRASH_LOOP."""

    PENDING = "PENDING"
    STARTING = "STARTING"
    READY = "READY"
    DRAINING = "DRAINING"
    STOPPING = "STOPPING"
    STOPPED = "STOPPED"
    FAILED = "FAILED"
    CRASH_LOOP = "CRASH_LOOP"


# A process may exist in these; STOPPED is the end, FAILED and CRASH_LOOP wait between two processes.
WITH_PROCESS = (State.STARTING, State.READY, State.DRAINING, State.STOPPING)
# These count towards the replicas wanted.
LIVE = (State.PENDING, State.STARTING, State.READY, State.FAILED, State.CRASH_LOOP)


class Cause(models.TextChoices):
    """Why a replica is there. Whoever asks by hand may have others unloaded for it, as requests that wait may."""

    MINIMUM = "minimum", "kept running"
    DEMAND = "demand", "asked for by a request"
    SCALE = "scale", "more load than the others take"
    MANUAL = "manual", "started by hand"
    RESTART = "restart", "replaces another process"


class DrainReason(models.TextChoices):
    """Why a process drains, which says what becomes of it when its time is over and it still works.

    STOP: it is ended. EVICT, YIELD: it goes on serving. EVICT also goes on where somebody asks for it meanwhile.
    """

    STOP = "stop", "asked to stop"
    EVICT = "evict", "idle, unloaded"
    YIELD = "yield", "makes room after its running requests"


class InstanceQuerySet(models.QuerySet["Instance"]):
    def ready(self) -> InstanceQuerySet:
        return self.filter(state=State.READY)

    def live(self) -> InstanceQuerySet:
        """Counts towards the replicas wanted."""
        return self.filter(state__in=LIVE)

    def with_process(self) -> InstanceQuerySet:
        """An engine process may exist."""
        return self.filter(state__in=WITH_PROCESS)

    def current(self) -> InstanceQuerySet:
        """Everything that has not ended for good."""
        return self.exclude(state=State.STOPPED)


class Instance(Revisioned):
    """One replica of a model on one node. A new engine process of the same replica is a new generation.

    Identity of the process = (boot_id, pid, start_ticks): a reused pid is never signalled.
    Runtime folder: ASSISTANT_HOME/instances/<id>/<generation>/, kept per run.
    """

    model = models.ForeignKey(ModelConfig, null=True, on_delete=models.SET_NULL, related_name="instances")
    model_name = models.CharField(max_length=128, help_text="Kept when the model is deleted.")
    part = models.CharField(max_length=16, default="chat", help_text="What it serves: chat, embedding, speech, or whole.")
    node = models.ForeignKey(Node, on_delete=models.PROTECT, related_name="instances")
    engine = models.CharField(max_length=32)
    state = models.CharField(max_length=16, choices=State.choices, default=State.PENDING)
    generation = models.PositiveIntegerField(default=0, help_text="Counts the processes of this replica.")
    slots = models.PositiveIntegerField(default=1)
    ctx_size = models.PositiveIntegerField(default=0)
    launch_digest = models.CharField(max_length=64, blank=True, help_text="SHA-256 of the launch specification.")
    launch = models.JSONField(default=dict, blank=True, help_text="The settings this generation was launched with.")
    engine_secret = models.TextField(blank=True, editable=False, help_text="The engine's API key, encrypted at rest.")

    port = models.PositiveIntegerField(null=True)
    pid = models.PositiveIntegerField(null=True)
    start_ticks = models.BigIntegerField(null=True)
    boot_id = models.CharField(max_length=36, blank=True)
    shim_pid = models.PositiveIntegerField(null=True)
    shim_start_ticks = models.BigIntegerField(null=True)

    cause = models.CharField(max_length=16, choices=Cause.choices, default=Cause.MINIMUM)
    replaces = models.ForeignKey(
        "self", null=True, on_delete=models.SET_NULL, related_name="+", help_text="The outdated process it takes over from."
    )
    created_at = models.DateTimeField(db_default=Now())
    state_changed_at = models.DateTimeField(db_default=Now())
    started_at = models.DateTimeField(null=True, help_text="When this generation's process was started.")
    ready_at = models.DateTimeField(null=True)
    deadline_at = models.DateTimeField(null=True, help_text="When the present state gives up.")
    failures = models.PositiveIntegerField(default=0, help_text="Failures in a row.")
    next_attempt_at = models.DateTimeField(null=True, help_text="When a failed instance is tried again.")

    memory_bytes = models.BigIntegerField(null=True, help_text="What it is expected to need; reserved while it loads.")
    hold = models.CharField(max_length=16, blank=True, help_text="Why it waits: memory, node_full; empty where it does not.")
    hold_reason = models.TextField(blank=True, help_text="One sentence on what it waits for.")
    wanted_since = models.DateTimeField(null=True, help_text="Since when requests wait for this one while it is held back.")
    drain_reason = models.CharField(max_length=8, choices=DrainReason.choices, blank=True)
    drain_detail = models.TextField(blank=True, help_text="One sentence on why it is ended.")
    last_used_at = models.DateTimeField(null=True, help_text="When its last request ended, to about ten seconds.")

    exit_code = models.IntegerField(null=True)
    exit_signal = models.IntegerField(null=True)
    exit_reason = models.TextField(blank=True, help_text="One sentence: what happened and what to do.")
    diagnosis = models.CharField(max_length=32, blank=True, help_text="What kind of end it was, in one word.")
    exit_log = models.TextField(blank=True, help_text="The engine's last lines.")
    exited_at = models.DateTimeField(null=True)
    peak_memory_bytes = models.BigIntegerField(null=True)

    objects = InstanceQuerySet.as_manager()

    class Meta:
        ordering: ClassVar = ["-id"]
        constraints: ClassVar = [
            models.CheckConstraint(condition=Q(state__in=State.values), name="instance_state_known"),
            models.CheckConstraint(
                condition=~Q(state=State.READY) | Q(port__isnull=False, pid__isnull=False), name="instance_ready_has_process"
            ),
            # Two live processes of one node can never be given the same port.
            models.UniqueConstraint(
                fields=["node", "port"],
                condition=Q(port__isnull=False, state__in=WITH_PROCESS),
                name="instance_port_unique_per_node",
            ),
        ]
        indexes: ClassVar = [
            # Reconcile, health and the admin's default list ask for everything that has not ended.
            models.Index(fields=["node", "state"], condition=~Q(state=State.STOPPED), name="instance_current"),
        ]

    def __str__(self) -> str:
        return f"{self.model_name}#{self.pk}"

    @property
    def makes_room(self) -> bool:
        """It drains, which may yet be called off."""
        return self.state == State.DRAINING and self.drain_reason in (DrainReason.EVICT, DrainReason.YIELD)
