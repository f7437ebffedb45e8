"""End engine processes of this node: after a drain where somebody asked, with a diagnosis where nobody did."""

from __future__ import annotations

import logging
import math
import time

from django.utils import timezone

from models_app import coordination, diagnosis, launch_spec, lifecycle, ports, runtime_folder, strays
from models_app.contracts.coordination import GatewayTelemetry
from models_app.contracts.diagnoses import Code
from models_app.diagnosis import Case, Exit
from models_app.engine_process import LOG_LINES, adopt, ask_to_end, engine_of, folder_of, kill, living
from models_app.exceptions import CoordinationUnavailable, StaleTransition
from models_app.models import DrainReason, Instance, State
from models_app.models.instance import WITH_PROCESS
from models_app.process_identity import boot_id, wait_gone

log = logging.getLogger(__name__)

QUICK_S = 0.2  # between the first looks at a starting or ending process
SLOW_S = 1.0
QUICK_FOR_S = 5.0
# A gateway acts on a snapshot up to a second old: so long it may still take up an instance that drains.
SNAPSHOT_AGE_S = 1.2
CLOCK_STEP_S = 5.0  # a state that began so far in the future began before the clock was set back


def pace(instance: Instance) -> float:
    """Seconds until the next look."""
    return QUICK_S if in_state_s(instance) < QUICK_FOR_S else SLOW_S


def in_state_s(instance: Instance) -> float:
    """Seconds since its state began; endless where the clock was set back meanwhile, lest it stay for as long as that."""
    elapsed = (timezone.now() - instance.state_changed_at).total_seconds()
    return math.inf if elapsed < -CLOCK_STEP_S else elapsed


def late(instance: Instance) -> bool:
    """Whether its deadline has come, or cannot be told any more."""
    if instance.deadline_at is None:
        return False
    return timezone.now() >= instance.deadline_at or in_state_s(instance) == math.inf


def stop(instance: Instance) -> float | None:
    """Begin to stop, in whatever state it is. Seconds until the next look, None where it has ended already."""
    if instance.state == State.READY or instance.makes_room:
        lifecycle.draining(instance)
    if instance.state == State.DRAINING:
        return advance_draining(instance)
    if instance.state == State.STARTING:
        return begin_stop(instance)
    if instance.state == State.STOPPING:
        return advance_stopping(instance)
    if instance.state != State.STOPPED:
        lifecycle.stopped(instance)
    return None


def advance_draining(instance: Instance) -> float | None:
    """One look at a DRAINING instance. One that only makes room is never ended while anybody may still use it."""
    if not living(instance):
        return begin_stop(instance)
    heard = _telemetry()
    if _let_go(instance, heard):
        return begin_stop(instance)
    if not instance.makes_room:
        return begin_stop(instance) if late(instance) else pace(instance)
    if late(instance) or (instance.drain_reason == DrainReason.EVICT and _asked_for(instance, heard)):
        lifecycle.undrained(instance)
        log.info("%s generation %d is in use again and stays", instance, instance.generation)
        return None
    return pace(instance)


def _telemetry() -> list[GatewayTelemetry] | None:
    """None where nobody can be asked."""
    try:
        return coordination.telemetry()
    except CoordinationUnavailable:
        return None


def _let_go(instance: Instance, heard: list[GatewayTelemetry] | None) -> bool:
    """No gateway may send to it any more, nor has it work. Where nobody can tell, the grace runs its full time.

    Without any gateway nobody uses it, as far as an administrator's stop is concerned; to unload it that is no proof.
    """
    try:
        users = coordination.users(instance.pk, instance.generation)
    except CoordinationUnavailable:
        return False
    if heard is None or users:
        return False
    if not heard:
        return not instance.makes_room
    key = f"{instance.pk}:{instance.generation}"
    working = any(gateway["instances"][key]["in_flight"] for gateway in heard if key in gateway["instances"])
    return not working and in_state_s(instance) >= SNAPSHOT_AGE_S


def _asked_for(instance: Instance, heard: list[GatewayTelemetry] | None) -> bool:
    """Requests wait for what it serves."""
    parts = (gateway["models"].get(instance.model_name, {}).get(instance.part) for gateway in heard or [])
    return any(part is not None and part["queued"] > 0 for part in parts)


def begin_stop(instance: Instance) -> float:
    """STARTING, READY or DRAINING → STOPPING, and TERM."""
    if engine_of(instance) is None:
        adopt(instance)
    lifecycle.stopping(instance)
    ask_to_end(instance)
    return QUICK_S


def advance_stopping(instance: Instance) -> float | None:
    """One look at a STOPPING instance: STOPPED once its processes and its port are gone."""
    if engine_of(instance) is None:
        adopt(instance)  # it was told to stop before its shim had reported
    if living(instance):
        if late(instance):
            kill(instance)
        else:
            ask_to_end(instance)  # whoever moved it to STOPPING may have died before it said so; repeating it is harmless
        return pace(instance)
    if instance.port is not None and not ports.bindable(instance.port) and not late(instance):
        return pace(instance)
    record = runtime_folder.read_exit(folder_of(instance))
    end = Exit(
        instance.drain_detail or "Stopped as asked.",
        "\n".join(record["lines"]) if record else "",
        peak_memory_bytes=record["peak_memory_bytes"] if record else None,
        diagnosis=Code.STOPPED,
    )
    lifecycle.stopped(instance, end)
    log.info("%s generation %d has ended: %s", instance, instance.generation, end.reason)
    return None


def bury(instance: Instance) -> None:
    """STARTING or READY → FAILED because the process has ended."""
    folder = folder_of(instance)
    for process in living(instance):  # the shim writes its record within a moment of the engine's end
        wait_gone(process, 1.0)
    record = runtime_folder.read_exit(folder)
    case = case_of(instance)
    if record:
        end = diagnosis.of_record(record, case)
    else:
        end = diagnosis.without_record(runtime_folder.last_log_lines(folder, LOG_LINES), case)
    kill(instance)
    log.warning("%s generation %d: %s", instance, instance.generation, end.reason)
    lifecycle.failed(instance, end)


def case_of(instance: Instance) -> Case:
    """What a diagnosis may need to know of this generation."""
    paths = (instance.launch.get(field) for field in launch_spec.PATH_OF_ROLE.values())
    return Case(
        engine=instance.engine,
        port=instance.port,
        model_path=next(filter(None, paths), ""),
        rebooted=bool(instance.boot_id) and instance.boot_id != boot_id(),
    )


def stop_everything(node_name: str, grace_s: float) -> None:
    """End every engine of this node within about grace_s seconds, without a worker; instances become STOPPED."""
    instances = list(Instance.objects.filter(node__name=node_name, state__in=WITH_PROCESS).select_related("node"))
    for instance in instances:
        try:
            if instance.state != State.STOPPING:
                begin_stop(instance)
            else:
                ask_to_end(instance)
        except StaleTransition as error:
            log.warning("While stopping everything: %s", error)
    until = time.monotonic() + grace_s
    for instance in instances:
        for process in living(instance):
            wait_gone(process, max(0.0, until - time.monotonic()))
        kill(instance)
        instance.refresh_from_db()
        if instance.state == State.STOPPING and not living(instance):
            lifecycle.stopped(instance, Exit("Stopped with the platform.", diagnosis=Code.STOPPED))
    strays.end_strays(node_name)
