"""Celery tasks: fetch, call the service, say what comes next. Nothing here waits for an engine.

Queues: control (any worker, the default), node.<name> (processes of that machine), bulk.<name> (long work of that machine).
Whatever a dead worker lost, the next reconcile orders again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

from celery import Task, current_app, shared_task
from django.conf import settings
from django.db import transaction
from django.utils import timezone
from kombu.exceptions import OperationalError

from models_app import backoff, coordination, health, loads, nodes, provisioning, usage_ingest
from models_app import reconcile as reconciling
from models_app.coordination import Lease
from models_app.exceptions import CoordinationUnavailable, StaleTransition
from models_app.models import Instance, State
from models_app.planning import Order

log = logging.getLogger(__name__)

# Longer than a round takes, and short, for the lease of a round that was killed stands in the way so long. Rounds that
# overlap after all do no harm: every transition is conditional, and one instance too many is dropped by the next round.
ROUND_LIFE_MS = 5_000
CHAIN_LIFE_MS = 6_000  # between two looks of one chain of advance() calls
ORDER_EXPIRES_S = 30
AGAIN_S = 0.1  # a worker's timer is no finer


class Limits(TypedDict):
    soft_time_limit: int
    time_limit: int


CONTROL: Limits = {"soft_time_limit": 20, "time_limit": 30}  # seconds


def node_queue(name: str) -> str:
    return f"node.{name}"


def bulk_queue(name: str) -> str:
    return f"bulk.{name}"


def request_reconcile() -> None:
    """Ask for a reconcile once this transaction has committed. Never raises: without a broker the periodic one must do."""
    transaction.on_commit(_enqueue_reconcile, robust=True)


def on_demand() -> None:
    """Somebody waits for a model that does not run. Never raises."""
    _enqueue_reconcile()


def _enqueue_reconcile() -> None:
    _enqueue(reconcile, kwargs={"insist": True}, expires=ORDER_EXPIRES_S)


def _enqueue(task: Task[Any, Any], **options: Any) -> None:
    """Send a task. Without a broker that is left to the next periodic reconcile: the caller may be somebody's request."""
    try:
        coordination.ping()  # a broker that hangs is found out in a second here; Celery would take several
        task.apply_async(**options, retry=False)
    except (OperationalError, CoordinationUnavailable) as error:
        log.warning("%s was not sent, the broker does not answer: %s", task.name, error)


@contextmanager
def _leased(name: str) -> Iterator[bool]:
    """Whether this is the only one of its kind now. Without Valkey it is not: the next period tries again."""
    try:
        lease = coordination.acquire(name, ROUND_LIFE_MS)
    except CoordinationUnavailable as error:
        log.warning("%s skipped: %s", name, error)
        lease = None
    try:
        yield lease is not None
    finally:
        if lease is not None:
            lease.release()


@shared_task(**CONTROL)
def reconcile(insist: bool = False) -> None:
    """One round. insist: something has changed just now, so if a round is under way run another right after it."""
    with _leased("reconcile") as alone:
        if alone:
            health.watch(settings.ASSISTANT_NODE)
            found = reconciling.run_round()
            for order in found.orders:
                _send(order)
            loads.follow(found.targets)
            return
    if insist:
        _enqueue(reconcile, countdown=AGAIN_S, expires=ORDER_EXPIRES_S)


def _send(order: Order) -> None:
    arguments = (order.instance_id, order.generation)
    _enqueue(_TASKS[order.do], args=arguments, queue=node_queue(order.node), expires=ORDER_EXPIRES_S)


@shared_task(**CONTROL)
def fan_out(task: str, queue: str, expires: float) -> None:
    """Send a periodic task to `<queue>.<node>` of every node."""
    for name in nodes.to_ask():
        _enqueue(current_app.tasks[task], queue=f"{queue}.{name}", expires=expires)


def _fetch(instance_id: int, generation: int, *states: State) -> Instance | None:
    """The instance if it is in this generation, in one of these states and on this machine."""
    found = Instance.objects.filter(pk=instance_id, generation=generation, node__name=settings.ASSISTANT_NODE, state__in=states)
    return found.select_related("node", "model").first()


@shared_task(**CONTROL)
def provision(instance_id: int, generation: int) -> None:
    """Start a PENDING instance, or a FAILED one whose time has come."""
    instance = _fetch(instance_id, generation, State.PENDING, State.FAILED)
    if instance is None or not (instance.next_attempt_at is None or backoff.due(instance.next_attempt_at, timezone.now())):
        return
    try:
        started = provisioning.provision(instance)
    except StaleTransition as error:
        log.info("Overtaken: %s", error)
        return
    if started:
        _begin_chain(instance)


@shared_task(**CONTROL)
def stop(instance_id: int, generation: int) -> None:
    """End a process, draining first."""
    instance = _fetch(instance_id, generation, *State)
    if instance is None:
        return
    try:
        if provisioning.stop(instance) is not None:
            _begin_chain(instance)
    except StaleTransition as error:
        log.info("Overtaken: %s", error)


def _begin_chain(instance: Instance) -> None:
    _enqueue(
        advance,
        args=(instance.pk, instance.generation),
        queue=node_queue(settings.ASSISTANT_NODE),
        countdown=provisioning.QUICK_S,
        expires=ORDER_EXPIRES_S,
    )


@shared_task(**CONTROL)
def advance(instance_id: int, generation: int, chain: str | None = None) -> None:
    """One look at an instance on its way; comes again until it has arrived.

    chain is the token of the lease that keeps two chains of looks from running beside each other. A call without one
    starts a chain, unless another is alive.
    """
    lease = _chain(f"advance:{instance_id}:{generation}", chain)
    if lease is None:
        return
    instance = _fetch(instance_id, generation, State.STARTING, State.DRAINING, State.STOPPING)
    if instance is None:
        lease.release()
        return
    try:
        again = provisioning.advance(instance)
    except StaleTransition as error:
        log.info("Overtaken: %s", error)
        again = provisioning.QUICK_S  # look at what it has become
    if instance.state == State.STARTING:
        loads.look(instance)
    if again is None:
        lease.release()
        request_reconcile()
        return
    queue = node_queue(settings.ASSISTANT_NODE)
    _enqueue(advance, args=(instance_id, generation, lease.token), queue=queue, countdown=again)


def _chain(name: str, token: str | None) -> Lease | None:
    try:
        if token is None:
            return coordination.acquire(name, CHAIN_LIFE_MS)
        lease = Lease(name, token)
        return lease if lease.renew(CHAIN_LIFE_MS) else None
    except CoordinationUnavailable as error:
        log.warning("A look at an instance is left to the next reconcile: %s", error)
        return None


@shared_task(**CONTROL)
def check_health() -> None:
    """Probe this node's READY instances."""
    with _leased(f"health:{settings.ASSISTANT_NODE}") as alone:
        if alone and health.check(settings.ASSISTANT_NODE):
            request_reconcile()


@shared_task(**CONTROL)
def node_heartbeat() -> None:
    """Prove that this node's worker works, and tidy up after it."""
    with _leased(f"heartbeat:{settings.ASSISTANT_NODE}") as alone:
        if not alone:
            return
        if nodes.heartbeat(settings.ASSISTANT_NODE):
            request_reconcile()
        nodes.tidy(settings.ASSISTANT_NODE)


@shared_task
def ingest_usage() -> None:
    """Move this node's usage spool into the database; one at a time by a file lock."""
    usage_ingest.ingest()


_TASKS: dict[str, Task[Any, Any]] = {"start": provision, "stop": stop, "advance": advance}
