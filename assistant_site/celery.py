"""The Celery application: `celery -A assistant_site.celery worker|beat`. Wires tasks, queues, schedule and logging."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
import warnings
from typing import Any

from celery import Celery, signals
from celery.app.amqp import AMQP
from celery.beat import Scheduler, SchedulingError
from celery.exceptions import SecurityWarning
from kombu import Connection

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "assistant_site.settings")

log = logging.getLogger(__name__)

# Its ground is pickle, which is not accepted here; in containers root is the usual user.
warnings.filterwarnings("ignore", category=SecurityWarning)


class QuickConnection(Connection):
    """A broker connection that tries again after 0.5, 1, 1.5, 2, 2 … s. Celery's 2, 4, 6 … 30 s cannot be set."""

    def ensure_connection(self, *args: Any, **kwargs: Any) -> Any:
        quick = {"interval_start": 0.5, "interval_step": 0.5, "interval_max": 2.0}
        return super().ensure_connection(*args, **{**quick, **kwargs})

    def maybe_close_channel(self, channel: Any) -> None:
        # With unacknowledged messages kombu tries to put them back through the transport that has just gone: without
        # this the worker would end. What is not put back is ordered again by reconcile.
        with contextlib.suppress(AttributeError):
            super().maybe_close_channel(channel)


class QuickAMQP(AMQP):
    Connection = QuickConnection


def every(seconds: float, task: str, kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
    """A schedule entry that expires after its period, so that no backlog can build."""
    return {
        "task": f"models_app.tasks.{task}",
        "schedule": seconds,
        "kwargs": kwargs or {},
        "options": {"queue": "control", "expires": seconds},
    }


def on_every_node(seconds: float, task: str, queue: str = "node") -> dict[str, Any]:
    """One that every node's own worker carries out, on its `<queue>.<node>`."""
    return every(seconds, "fan_out", {"task": f"models_app.tasks.{task}", "queue": queue, "expires": seconds})


class LeasedScheduler(Scheduler):
    """Keeps its schedule in memory, counts time by the monotonic clock and refuses to run beside another beat.

    Celery's own goes by the wall clock: set back by an hour, it would send nothing for an hour.
    """

    LEASE = "beat"
    LIFE_MS = 15_000
    RENEW_S = 5.0

    data: dict[str, Any]  # the schedule; celery.beat.Scheduler.schedule is a property over it

    def setup_schedule(self) -> None:
        self._due: dict[str, float] = {}
        self._take_lease()
        self.install_default_entries(self.data)
        self.merge_inplace(self.app.conf.beat_schedule)

    def _take_lease(self) -> None:
        from models_app import coordination
        from models_app.exceptions import CoordinationUnavailable

        try:
            lease = coordination.acquire(self.LEASE, self.LIFE_MS, _own_token())
            if lease is None and (token := coordination.holder(self.LEASE)) is not None:
                if not _died_here(token):
                    raise SystemExit(f"Another beat runs already ({_describe(token)}); this one ends.")
                coordination.Lease(self.LEASE, token).release()
                lease = coordination.acquire(self.LEASE, self.LIFE_MS, _own_token())
        except CoordinationUnavailable as error:
            raise SystemExit(f"Beat cannot start: {error}") from error
        if lease is None:
            raise SystemExit("Another beat was faster; this one ends.")
        self._lease = lease
        self._renewed = time.monotonic()

    def tick(self, *args: Any, **kwargs: Any) -> Any:
        if time.monotonic() - self._renewed >= self.RENEW_S:
            self._renew()
        return super().tick(*args, **kwargs)

    def is_due(self, entry: Any) -> Any:
        """Whether an entry is to be sent now, and in how many seconds to ask again."""
        run_every = getattr(entry.schedule, "run_every", None)
        if run_every is None:
            return super().is_due(entry)  # one that means times of day
        now, period = time.monotonic(), run_every.total_seconds()
        due = self._due.setdefault(entry.name, now)
        if now < due:
            return False, due - now
        self._due[entry.name] = now + period
        return True, period

    def _when(self, _entry: Any, next_time_to_run: float | None, **_: Any) -> float:
        """Where in the order of what comes next."""
        return time.monotonic() + (next_time_to_run or 0)

    def apply_entry(self, entry: Any, producer: Any = None) -> None:
        """Send what is due. Without a broker it is dropped, with one line in the log: the next period comes soon."""
        try:
            self.apply_async(entry, producer=producer, advance=False)
        except SchedulingError as error:
            log.warning("%s", error)

    def _renew(self) -> None:
        from models_app.exceptions import CoordinationUnavailable

        try:
            if not self._lease.renew(self.LIFE_MS):
                self._take_lease()  # it ran out while Valkey or this process was away
        except CoordinationUnavailable as error:
            log.warning("The beat's lease could not be renewed: %s", error)
        self._renewed = time.monotonic()

    def close(self) -> None:
        super().close()
        if hasattr(self, "_lease"):
            self._lease.release()


def _own_token() -> str:
    """Who we are, so that a successor on this machine can tell that we are dead."""
    from django.conf import settings

    from models_app.process_identity import identify

    identity = identify(os.getpid())
    assert identity is not None
    return "/".join(
        (settings.ASSISTANT_NODE, identity.boot_id, str(identity.pid), str(identity.start_ticks), secrets.token_hex(4))
    )


def _died_here(token: str) -> bool:
    """Whether the holder was a process of this machine and is gone."""
    from django.conf import settings

    from models_app.process_identity import ProcessIdentity, alive

    try:
        node, boot, pid, ticks, _ = token.split("/")
        return node == settings.ASSISTANT_NODE and not alive(ProcessIdentity(boot, int(pid), int(ticks)))
    except ValueError:
        return False


def _describe(token: str) -> str:
    node, _, pid, *_ = token.split("/") if token.count("/") == 4 else ("unknown", "", "unknown")
    return f"pid {pid} on node {node}"


app = Celery("assistant", amqp="assistant_site.celery:QuickAMQP")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks(["models_app"])
app.conf.broker_connection_max_retries = None  # for ever
app.conf.worker_cancel_long_running_tasks_on_connection_loss = True  # concerns late acknowledgement alone, which no task has
app.conf.worker_timer_precision = 0.1  # seconds: the default of 1 s would make every short countdown a long one
app.conf.beat_scheduler = "assistant_site.celery:LeasedScheduler"
app.conf.beat_schedule = {
    "reconcile": every(2.0, "reconcile"),
    "health": on_every_node(5.0, "check_health"),
    "node-heartbeat": on_every_node(5.0, "node_heartbeat"),
    "usage-ingest": on_every_node(5.0, "ingest_usage", queue="bulk"),
}


@signals.setup_logging.connect(weak=False)
def leave_logging_to_django(**_: Any) -> None:
    """Being connected keeps Celery from configuring logging; a line per periodic task would drown everything else."""
    for noisy in ("celery.app.trace", "celery.worker.strategy", "celery.beat", "kombu"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@signals.worker_ready.connect(weak=False)
def announce_node(sender: Any, **_: Any) -> None:
    """A worker that serves this machine's queue says so at once, rather than when it is asked."""
    from django.conf import settings

    from models_app import tasks

    queue = tasks.node_queue(settings.ASSISTANT_NODE)
    if queue in sender.app.amqp.queues.consume_from:
        tasks.node_heartbeat.apply_async(queue=queue, expires=30)


@signals.worker_ready.connect(weak=False)
def listen_for_demand(sender: Any, **_: Any) -> None:
    """A worker that carries out reconcile hears at once when a gateway finds nothing ready for a request."""
    from models_app import tasks
    from models_app.demand import DemandListener

    if "control" in sender.app.amqp.queues.consume_from:
        listener = DemandListener(tasks.on_demand)
        listener.start()
        signals.worker_shutting_down.connect(lambda **_: listener.stop(), weak=False)
