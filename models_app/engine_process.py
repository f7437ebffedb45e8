"""The two processes of one instance on this node: who they are, whether they live, what the engine says, how they are killed."""

from __future__ import annotations

import signal
import ssl
from pathlib import Path

import httpx
from django.conf import settings

from models_app import engine_access, lifecycle, ports, runtime_folder
from models_app.contracts import secret_box
from models_app.engines.base import Health, Probe, Target
from models_app.exceptions import SecretUnreadable
from models_app.models import Instance, State
from models_app.process_identity import ProcessIdentity, alive, send, wait_gone
from models_app.shim import ExitRecord

PROBE_TIMEOUT_S = 2.0
LOG_LINES = 200  # kept of a run that ended
# Engines speak plain HTTP. Without this every probe would read all certificate authorities first, which takes 20 ms.
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


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


def adopt(instance: Instance) -> ProcessIdentity | None:
    """Record the processes a shim wrote down although the worker that started it did not live to; the engine, if there is one."""
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
    with httpx.Client(timeout=timeout_s, trust_env=False, verify=_NO_TLS) as client:
        return engine_access.adapter(instance.engine).probe(target, client)


def ask_to_end(instance: Instance) -> None:
    """TERM through the shim, which kills after its grace; to the engine itself where the shim is gone."""
    for process in living(instance)[:1]:
        send(process, signal.SIGTERM)


def kill(instance: Instance, patience_s: float = 2.0) -> bool:
    """End both processes at once; True where they are proven gone."""
    for process, number in ((shim_of(instance), signal.SIGQUIT), (engine_of(instance), signal.SIGKILL)):
        # QUIT lets the shim kill the whole group and write its record; only a deaf one leaves work for the next line.
        if process is not None and send(process, number) and not wait_gone(process, patience_s):
            send(process, signal.SIGKILL)
    return all(wait_gone(process, patience_s) for process in living(instance))


def put_down(instance: Instance) -> tuple[list[str], ExitRecord | None]:
    """Kill it; the last lines of its log, and its exit record where its shim could write one."""
    kill(instance)
    folder = folder_of(instance)
    return runtime_folder.last_log_lines(folder, LOG_LINES), runtime_folder.read_exit(folder)
