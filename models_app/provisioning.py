"""Engine processes of this node as the tasks see them: start one, look at one on its way, stop one. Every step is short.

The work is done in starting.py, ending.py, strays.py and engine_process.py; here is the look at a process that loads.
"""

from __future__ import annotations

import logging
from datetime import datetime

import psutil
from django.utils import timezone

from models_app import diagnosis, lifecycle, ports, runtime_folder
from models_app.ending import (
    QUICK_FOR_S,
    QUICK_S,
    advance_draining,
    advance_stopping,
    begin_stop,
    bury,
    in_state_s,
    late,
    pace,
    stop,
    stop_everything,
)
from models_app.engine_process import adopt, engine_of, folder_of, kill, living, probe, put_down, shim_of
from models_app.engines.base import Health
from models_app.models import Instance, State
from models_app.process_identity import ProcessIdentity, alive
from models_app.starting import provision
from models_app.strays import Stray, end_strays, find_strays, marked_processes

__all__ = [
    "QUICK_S",
    "Stray",
    "advance",
    "begin_stop",
    "bury",
    "end_strays",
    "engine_of",
    "find_strays",
    "folder_of",
    "kill",
    "living",
    "marked_processes",
    "probe",
    "provision",
    "shim_of",
    "stop",
    "stop_everything",
]

log = logging.getLogger(__name__)

SPAWN_S = 20.0  # after so long without a report there is no shim to wait for
MOVING_S = 30.0  # a load whose log or memory has moved within this time gets more than its deadline …
LONGEST_FACTOR = 4  # … but not for ever
MOVED_BYTES = 1 << 20  # a change of its memory by less is no movement


def advance(instance: Instance) -> float | None:
    """One step of a STARTING, DRAINING or STOPPING instance. Seconds until the next look, None where it has arrived.

    Raises StaleTransition where somebody else moved it meanwhile.
    """
    steps = {State.STARTING: _advance_starting, State.DRAINING: advance_draining, State.STOPPING: advance_stopping}
    step = steps.get(State(instance.state))
    return None if step is None else step(instance)


def _advance_starting(instance: Instance) -> float | None:
    engine = engine_of(instance) or adopt(instance)
    if engine is None:
        # Its shim has not reported yet, or the worker that claimed this generation died before it started one.
        if in_state_s(instance) > SPAWN_S:
            what = "No process was started: the worker was interrupted, or this machine is overloaded."
            lifecycle.failed(instance, diagnosis.not_started(what))
            return None
        return pace(instance)
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
        if in_state_s(instance) > QUICK_FOR_S:
            port = instance.port or 0
            lifecycle.failed(instance, diagnosis.wrong_server(port, ports.holder(port), *put_down(instance)))
            return None
    elif _too_late(instance, engine):
        lifecycle.failed(instance, diagnosis.not_ready(*put_down(instance)))
        return None
    return pace(instance)


def _too_late(instance: Instance, engine: ProcessIdentity) -> bool:
    """Past its deadline, and either nothing of it moves any more or it has had several times as long."""
    still_s = runtime_folder.still_s(folder_of(instance), _resident_bytes(engine), MOVED_BYTES)
    if not late(instance):
        return False
    return still_s >= MOVING_S or timezone.now() >= _longest(instance)


def _longest(instance: Instance) -> datetime:
    started = instance.started_at or instance.state_changed_at
    return started + LONGEST_FACTOR * ((instance.deadline_at or started) - started)


def _resident_bytes(engine: ProcessIdentity) -> int:
    """Memory of the engine and its children; 0 where it cannot be told."""
    try:
        process = psutil.Process(engine.pid)
        return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
    except psutil.Error:
        return 0
