"""The only writer of Instance.state.

Every transition is one conditional UPDATE on (id, state, generation) that must touch exactly one row, else StaleTransition:
whoever acts on an old view of an instance changes nothing. On success the object in hand is brought up to date.

    PENDING → STARTING → READY ⇄ DRAINING → STOPPING → STOPPED      (⇄: a drain that only makes room may be called off)
                 │          │
                 └──────────┴──→ FAILED ──(back-off)──→ STARTING … → CRASH_LOOP (reset by hand or by a changed configuration)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.utils import timezone

from models_app import coordination, incidents
from models_app.backoff import FIRST_DELAY_S, delay_s
from models_app.contracts.diagnoses import Code
from models_app.diagnosis import Exit
from models_app.exceptions import StaleTransition
from models_app.models import Cause, DrainReason, Instance, ModelConfig, Node, State
from models_app.process_identity import ProcessIdentity

STABLE_S = 60.0  # ready for so long and a failure is a first one again
EVICT_GRACE_S = 10.0  # an idle process has nothing to end; where it is still held after so long somebody came back to it
YIELD_GRACE_S = 600.0  # a busy one that makes room ends its requests meanwhile, or goes on
# Nothing that has ended or was refused waits for room.
_NO_HOLD: dict[str, Any] = {"hold": "", "hold_reason": "", "wanted_since": None}


@dataclass(frozen=True, slots=True)
class Claim:
    """What a start takes: the next generation of the instance, its port, its secret (sealed) and what it is launched with."""

    port: int
    sealed_secret: str
    digest: str
    launch: dict[str, Any]
    model_name: str
    engine: str
    slots: int
    ctx_size: int
    deadline_at: datetime
    memory_bytes: int | None = None  # what it is expected to need


def failures_after(instance: Instance, now: datetime) -> int:
    """Failures in a row, this one included: a first one again where the process had been ready for a stable while."""
    stable = instance.ready_at is not None and (now - instance.ready_at).total_seconds() >= STABLE_S
    return 1 if instance.state == State.READY and stable else instance.failures + 1


def _move(instance: Instance, before: Collection[State], to: State, **fields: Any) -> None:
    """The one place where a state is written; before: the states this transition starts from."""
    if instance.state not in before:
        raise StaleTransition(f"{instance} cannot go from {instance.state} to {to}.")
    changes = {"state": to, "state_changed_at": timezone.now(), "deadline_at": None, **fields}
    _update(instance, changes)


def _update(instance: Instance, changes: dict[str, Any]) -> None:
    """One conditional UPDATE in the state, the generation and, while it drains, for the reason in hand."""
    mine = Instance.objects.filter(pk=instance.pk, state=instance.state, generation=instance.generation)
    if instance.state == State.DRAINING:
        mine = mine.filter(drain_reason=instance.drain_reason)
    if mine.update(**changes) != 1:
        raise StaleTransition(f"{instance} is no longer {instance.state} in generation {instance.generation}.")
    for name, value in changes.items():
        setattr(instance, name, value)
    transaction.on_commit(coordination.publish_revision)


def create(model: ModelConfig, node: Node, part: str, cause: str = Cause.MINIMUM, replaces: Instance | None = None) -> Instance:
    """A replica that waits to be started: PENDING. replaces: the outdated one it takes over from."""
    instance = Instance.objects.create(
        model=model,
        model_name=model.name,
        part=part,
        cause=cause,
        replaces=replaces,
        node=node,
        engine=model.engine,
        slots=model.slots,
        ctx_size=model.ctx_size,
    )
    transaction.on_commit(coordination.publish_revision)
    return instance


def starting(instance: Instance, claim: Claim) -> None:
    """PENDING or FAILED → STARTING. The winner owns the next generation and may spawn it.

    Raises IntegrityError where another process of the node was given the port meanwhile.
    """
    _move(
        instance,
        (State.PENDING, State.FAILED),
        State.STARTING,
        generation=instance.generation + 1,
        port=claim.port,
        engine_secret=claim.sealed_secret,
        launch_digest=claim.digest,
        launch=claim.launch,
        model_name=claim.model_name,
        engine=claim.engine,
        slots=claim.slots,
        ctx_size=claim.ctx_size,
        deadline_at=claim.deadline_at,
        started_at=timezone.now(),
        ready_at=None,
        next_attempt_at=None,
        pid=None,
        start_ticks=None,
        boot_id="",
        shim_pid=None,
        shim_start_ticks=None,
        exit_code=None,
        exit_signal=None,
        exited_at=None,
        peak_memory_bytes=None,
        memory_bytes=claim.memory_bytes,
        **_NO_HOLD,
        drain_reason="",
        drain_detail="",
    )


def held(instance: Instance, hold: str, reason: str, wanted: bool, memory_bytes: int | None = None) -> None:
    """PENDING or FAILED → PENDING that waits for room; reason is a sentence. wanted: requests wait for it now.

    memory_bytes: what it will need.

    Said again and again while it waits, so what has not changed is not written.
    """
    since = (instance.wanted_since or timezone.now()) if wanted else None
    told = {"hold": hold, "hold_reason": reason, "wanted_since": since, "memory_bytes": memory_bytes}
    if instance.state == State.FAILED:
        _move(instance, (State.FAILED,), State.PENDING, next_attempt_at=None, **told)
    elif instance.state != State.PENDING:
        raise StaleTransition(f"{instance} is {instance.state} and cannot wait for room.")
    elif any(getattr(instance, name) != value for name, value in told.items()):
        _update(instance, told)


def insisted(instance: Instance) -> None:
    """Somebody has asked for this replica by hand: others may be unloaded for it. The state stays."""
    if instance.cause != Cause.MANUAL:
        _update(instance, {"cause": Cause.MANUAL})


def spawned(instance: Instance, engine: ProcessIdentity, shim: ProcessIdentity) -> None:
    """Record who the processes of this generation are; the state stays."""
    _update(
        instance,
        {
            "pid": engine.pid,
            "start_ticks": engine.start_ticks,
            "boot_id": engine.boot_id,
            "shim_pid": shim.pid,
            "shim_start_ticks": shim.start_ticks,
        },
    )


def ready(instance: Instance) -> None:
    """STARTING → READY: the right process answers on the right port."""
    _move(instance, (State.STARTING,), State.READY, ready_at=timezone.now(), exit_reason="", exit_log="", diagnosis="")


def draining(instance: Instance, reason: str = DrainReason.STOP, detail: str = "") -> None:
    """READY → DRAINING: gateways send nothing new; what runs may end until the deadline. detail: a sentence that says why.

    One that drains to make room can also be told to stop for good.
    """
    before = (State.READY, State.DRAINING) if instance.makes_room and reason == DrainReason.STOP else (State.READY,)
    grace_s = {
        DrainReason.STOP: settings.ASSISTANT_ENGINE_DRAIN_S,
        DrainReason.EVICT: EVICT_GRACE_S,
        DrainReason.YIELD: YIELD_GRACE_S,
    }[DrainReason(reason)]
    deadline_at = timezone.now() + timedelta(seconds=grace_s)
    _move(instance, before, State.DRAINING, deadline_at=deadline_at, drain_reason=reason, drain_detail=detail)


def undrained(instance: Instance) -> None:
    """DRAINING → READY in the same generation: it was to make room only, and is still used or asked for again."""
    if not instance.makes_room:
        raise StaleTransition(f"{instance} does not drain to make room, so it does not come back.")
    _move(instance, (State.DRAINING,), State.READY, drain_reason="", drain_detail="")


def stopping(instance: Instance) -> None:
    """STARTING, READY or DRAINING → STOPPING: the process is being ended; killed at the deadline."""
    # The shim kills after ASSISTANT_ENGINE_TERM_S by itself; past this deadline the shim itself is deaf.
    deadline_at = timezone.now() + timedelta(seconds=settings.ASSISTANT_ENGINE_TERM_S + 2)
    _move(instance, (State.STARTING, State.READY, State.DRAINING), State.STOPPING, deadline_at=deadline_at)


def stopped(instance: Instance, end: Exit | None = None) -> None:
    """→ STOPPED, for good. From STOPPING only once pid and port are proven gone."""
    before = (State.PENDING, State.FAILED, State.CRASH_LOOP, State.STOPPING)
    _move(instance, before, State.STOPPED, next_attempt_at=None, **(_exit_fields(end) if end else {}), **_NO_HOLD)


def fenced(instance: Instance, reason: str) -> None:
    """Any state but STOPPED → STOPPED, although its process may still run on a node that cannot be asked."""
    _move(instance, set(State) - {State.STOPPED}, State.STOPPED, next_attempt_at=None, **_exit_fields(Exit(reason)))


def failed(instance: Instance, end: Exit) -> None:
    """STARTING or READY → FAILED with the time of the next try, or CRASH_LOOP after too many failures in a row."""
    now = timezone.now()
    failures = failures_after(instance, now)
    given_up = failures >= settings.ASSISTANT_ENGINE_TRIES
    # Another port is chosen for the next try, so there is nothing to wait for.
    delay = 0.0 if end.diagnosis == Code.PORT_TAKEN else delay_s(failures)
    next_attempt = None if given_up else now + timedelta(seconds=delay)
    state = State.CRASH_LOOP if given_up else State.FAILED
    before = (State.STARTING, State.READY)
    with transaction.atomic():
        _move(instance, before, state, failures=failures, next_attempt_at=next_attempt, **_exit_fields(end))
        incidents.record(instance, end)


def refused(instance: Instance, reason: str, digest: str, diagnosis: str = Code.PREFLIGHT) -> None:
    """PENDING or FAILED → FAILED without a process. Checks cost little, so they are repeated for ever: a file may still come.

    It is no failure of an engine: once it can be started, it has all its tries.
    """
    next_attempt = timezone.now() + timedelta(seconds=max(FIRST_DELAY_S, delay_s(instance.failures)))
    end = Exit(reason, diagnosis=diagnosis)
    before = (State.PENDING, State.FAILED)
    # exited_at stays: nothing has ended now
    told = {name: value for name, value in _exit_fields(end).items() if name != "exited_at"}
    with transaction.atomic():
        _move(instance, before, State.FAILED, next_attempt_at=next_attempt, launch_digest=digest, **told, **_NO_HOLD)
        incidents.record(instance, end)


def reset(instance: Instance) -> None:
    """FAILED or CRASH_LOOP → PENDING: by hand or by a changed configuration; earlier failures are forgotten."""
    _move(instance, (State.FAILED, State.CRASH_LOOP), State.PENDING, failures=0, next_attempt_at=None, launch_digest="")


def outdate(instance: Instance) -> None:
    """Let reconcile replace this process although its configuration has not changed; the state stays."""
    _update(instance, {"launch_digest": ""})


def _exit_fields(end: Exit) -> dict[str, Any]:
    return {
        "exit_reason": end.reason,
        "exit_log": end.log,
        "diagnosis": end.diagnosis,
        "exit_code": end.code,
        "exit_signal": end.signal,
        "exited_at": timezone.now(),
        "peak_memory_bytes": end.peak_memory_bytes,
    }
