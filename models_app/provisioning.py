"""Start, advance, stop and find engine processes of this node. Every step is short: nothing here waits for an engine to load."""

from __future__ import annotations

import logging
import secrets
import signal
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import httpx
import psutil
from django.conf import settings
from django.db import IntegrityError, transaction
from django.utils import timezone

from models_app import coordination, diagnosis, engine_access, launch_spec, lifecycle, ports, runtime_folder
from models_app.contracts import secret_box
from models_app.diagnosis import Case, Exit
from models_app.diagnosis_rules import Code
from models_app.engines.base import EngineAdapter, Health, Launch, ModelSpec, Probe, Target
from models_app.exceptions import CoordinationUnavailable, PreflightError, SecretUnreadable, SpawnError, StaleTransition
from models_app.models import Instance, ModelConfig, State
from models_app.models.instance import WITH_PROCESS
from models_app.process_identity import ProcessIdentity, alive, boot_id, identify, send, wait_gone
from models_app.shim import ExitRecord

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 2.0
QUICK_S = 0.2  # between the first looks at a starting or ending process
SLOW_S = 1.0
QUICK_FOR_S = 5.0
# A gateway acts on a snapshot up to a second old: so long it may still take up an instance that drains.
SNAPSHOT_AGE_S = 1.2
SPAWN_S = 20.0  # after so long without a report there is no shim to wait for
PORT_TRIES = 3
LOG_LINES = 200  # kept of a run that ended


def is_local(instance: Instance) -> bool:
    return instance.node.name == settings.ASSISTANT_NODE


def folder_of(instance: Instance) -> Path:
    return runtime_folder.path(instance.pk, instance.generation)


def engine_of(instance: Instance) -> ProcessIdentity | None:
    """The engine process on record, None where none is."""
    if instance.pid is None or instance.start_ticks is None:
        return None
    return ProcessIdentity(instance.boot_id, instance.pid, instance.start_ticks)


def shim_of(instance: Instance) -> ProcessIdentity | None:
    """The shim process on record, None where none is."""
    if instance.shim_pid is None or instance.shim_start_ticks is None:
        return None
    return ProcessIdentity(instance.boot_id, instance.shim_pid, instance.shim_start_ticks)


def living(instance: Instance) -> list[ProcessIdentity]:
    """Those of the instance's two processes that still run, shim first."""
    return [one for one in (shim_of(instance), engine_of(instance)) if one is not None and alive(one)]


# Start


def provision(instance: Instance) -> bool:
    """PENDING or FAILED → STARTING with a spawned process, or FAILED with the reason. True where a process was started.

    Raises StaleTransition where somebody else was faster.
    """
    config = instance.model
    if config is None or not config.enabled:
        return False
    digest = launch_spec.digest(config, instance.part)
    try:
        adapter = engine_access.adapter(config.engine)
        spec = launch_spec.model_spec(config, instance.part)
        adapter.preflight(spec)
        launch = _claim(instance, config, spec, digest)
    except PreflightError as error:
        log.warning("%s cannot start: %s", instance, error)
        lifecycle.refused(instance, str(error), digest)
        return False
    return _spawn(instance, adapter, launch)


def _claim(instance: Instance, config: ModelConfig, spec: ModelSpec, digest: str) -> Launch:
    """Take a port and the next generation. A port that another process got between look and claim is chosen anew."""
    secret = secrets.token_urlsafe(32)
    deadline_at = timezone.now() + timedelta(seconds=launch_spec.load_deadline_s(spec))
    for _ in range(PORT_TRIES):
        busy = Instance.objects.with_process().filter(node=instance.node)
        taken = {port for port in busy.values_list("port", flat=True) if port is not None}
        claim = lifecycle.Claim(
            port=ports.choose(config.port, taken, settings.ASSISTANT_ENGINE_PORTS),
            sealed_secret=secret_box.seal(settings.SECRET_KEY, secret),
            digest=digest,
            launch=launch_spec.launch_values(config, instance.part),
            model_name=config.name,
            engine=config.engine,
            slots=spec.slots,
            ctx_size=spec.ctx_size,
            deadline_at=deadline_at,
        )
        try:
            with transaction.atomic():
                lifecycle.starting(instance, claim)
        except IntegrityError:
            continue
        return Launch(spec, instance.pk, instance.generation, claim.port, secret, folder_of(instance))
    raise PreflightError("Ports are being taken as fast as they are chosen; this is tried again.")


def _spawn(instance: Instance, adapter: EngineAdapter, launch: Launch) -> bool:
    command = adapter.command(launch)
    try:
        runtime_folder.prepare(launch.folder, command)
        pair = runtime_folder.spawn(launch.folder, launch.instance_id, launch.generation, command.env)
    except (OSError, SpawnError) as error:
        lifecycle.failed(instance, diagnosis.not_started(f"The engine could not be started: {error}"))
        return False
    if pair is not None:  # else advance() looks for it
        lifecycle.spawned(instance, pair.engine, pair.shim)
        log.info("%s generation %d: engine pid %d on port %d", instance, launch.generation, pair.engine.pid, launch.port)
    return True


# Advance: one look, then the caller comes again


def advance(instance: Instance) -> float | None:
    """One step of a STARTING, DRAINING or STOPPING instance. Seconds until the next look, None where it has arrived.

    Raises StaleTransition where somebody else moved it meanwhile.
    """
    steps = {State.STARTING: _advance_starting, State.DRAINING: _advance_draining, State.STOPPING: _advance_stopping}
    step = steps.get(State(instance.state))
    return None if step is None else step(instance)


def _pace(instance: Instance) -> float:
    return QUICK_S if (timezone.now() - instance.state_changed_at).total_seconds() < QUICK_FOR_S else SLOW_S


def _late(instance: Instance) -> bool:
    return instance.deadline_at is not None and timezone.now() >= instance.deadline_at


def _advance_starting(instance: Instance) -> float | None:
    engine = engine_of(instance) or _adopt(instance)
    if engine is None:
        # Its shim has not reported yet, or the worker that claimed this generation died before it started one.
        if (timezone.now() - instance.state_changed_at).total_seconds() > SPAWN_S:
            what = "No process was started: the worker was interrupted, or this machine is overloaded."
            lifecycle.failed(instance, diagnosis.not_started(what))
            return None
        return _pace(instance)
    if not alive(engine):
        bury(instance)
        return None
    found = probe(instance)
    if found.health == Health.READY and instance.port is not None and ports.listens(engine, instance.port):
        lifecycle.ready(instance)
        log.info("%s generation %d is READY", instance, instance.generation)
        return None
    if found.health in (Health.READY, Health.WRONG_SERVER):
        # Somebody else may hold the port while ours is about to fail on it: its own exit tells more, if it comes.
        if (timezone.now() - instance.state_changed_at).total_seconds() > QUICK_FOR_S:
            port = instance.port or 0
            lifecycle.failed(instance, diagnosis.wrong_server(port, ports.holder(port), *_put_down(instance)))
            return None
    elif _late(instance):
        lifecycle.failed(instance, diagnosis.not_ready(*_put_down(instance)))
        return None
    return _pace(instance)


def _adopt(instance: Instance) -> ProcessIdentity | None:
    """Record the processes a shim wrote down although the worker that started it did not live to."""
    pair = runtime_folder.read_identity(folder_of(instance))
    if pair is None:
        return None
    lifecycle.spawned(instance, pair.engine, pair.shim)
    return pair.engine


def probe(instance: Instance, timeout_s: float = PROBE_TIMEOUT_S) -> Probe:
    """Ask the engine; never costs it a completion."""
    try:
        secret = secret_box.unseal(settings.SECRET_KEY, instance.engine_secret)
    except SecretUnreadable as error:
        return Probe(Health.WRONG_SERVER, str(error))
    target = Target(ports.HOST, instance.port or 0, secret, instance.model_name, proven=instance.state == State.READY)
    # trust_env=False: a proxy of the environment has no business between us and loopback.
    with httpx.Client(timeout=timeout_s, trust_env=False) as client:
        return engine_access.adapter(instance.engine).probe(target, client)


def _put_down(instance: Instance) -> tuple[list[str], ExitRecord | None]:
    """Kill it; the last lines of its log, and its exit record where its shim could write one."""
    kill(instance)
    folder = folder_of(instance)
    return runtime_folder.last_log_lines(folder, LOG_LINES), runtime_folder.read_exit(folder)


def _advance_draining(instance: Instance) -> float | None:
    if not living(instance) or _late(instance) or _drained(instance):
        return begin_stop(instance)
    return _pace(instance)


def _drained(instance: Instance) -> bool:
    """No gateway may send to it any more. Where nobody can tell, the grace runs its full time."""
    try:
        if coordination.users(instance.pk, instance.generation):
            return False
        gateways = bool(coordination.telemetry())
    except CoordinationUnavailable:
        return False
    since = (timezone.now() - instance.state_changed_at).total_seconds()
    return not gateways or since >= SNAPSHOT_AGE_S


def begin_stop(instance: Instance) -> float:
    """STARTING, READY or DRAINING → STOPPING, and TERM."""
    if engine_of(instance) is None:
        _adopt(instance)
    lifecycle.stopping(instance)
    _ask_to_end(instance)
    return QUICK_S


def _ask_to_end(instance: Instance) -> None:
    """TERM through the shim, which kills after its grace; to the engine itself where the shim is gone."""
    for process in living(instance)[:1]:
        send(process, signal.SIGTERM)


def _advance_stopping(instance: Instance) -> float | None:
    if engine_of(instance) is None:
        _adopt(instance)  # it was told to stop before its shim had reported
    if living(instance):
        if _late(instance):
            kill(instance)
        else:
            _ask_to_end(instance)  # whoever moved it to STOPPING may have died before it said so; repeating it is harmless
        return _pace(instance)
    if instance.port is not None and not ports.bindable(instance.port) and not _late(instance):
        return _pace(instance)
    record = runtime_folder.read_exit(folder_of(instance))
    peak = record["peak_memory_bytes"] if record else None
    lifecycle.stopped(
        instance,
        Exit("Stopped as asked.", "\n".join(record["lines"]) if record else "", peak_memory_bytes=peak, diagnosis=Code.STOPPED),
    )
    log.info("%s generation %d has ended", instance, instance.generation)
    return None


# End


def stop(instance: Instance) -> float | None:
    """Begin to stop, in whatever state it is. Seconds until advance() should look, None where it has ended already."""
    if instance.state == State.READY:
        lifecycle.draining(instance)
        return advance(instance)
    if instance.state == State.STARTING:
        return begin_stop(instance)
    if instance.state in (State.PENDING, State.FAILED, State.CRASH_LOOP):
        lifecycle.stopped(instance)
        return None
    return advance(instance)


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


def kill(instance: Instance, patience_s: float = 2.0) -> bool:
    """End both processes at once; True where they are proven gone."""
    for process, number in ((shim_of(instance), signal.SIGQUIT), (engine_of(instance), signal.SIGKILL)):
        # QUIT lets the shim kill the whole group and write its record; only a deaf one leaves work for the next line.
        if process is not None and send(process, number) and not wait_gone(process, patience_s):
            send(process, signal.SIGKILL)
    return all(wait_gone(process, patience_s) for process in living(instance))


# Strays


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


# The end of the platform


def stop_everything(node_name: str, grace_s: float) -> None:
    """End every engine of this node within about grace_s seconds, without a worker; instances become STOPPED."""
    instances = list(Instance.objects.filter(node__name=node_name, state__in=WITH_PROCESS).select_related("node"))
    for instance in instances:
        try:
            if instance.state != State.STOPPING:
                begin_stop(instance)
            else:
                _ask_to_end(instance)
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
    end_strays(node_name)
