"""The programs of the whole platform on one machine, as `up` runs them: what, in which order, and how each proves ready."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from contextlib import suppress

import psutil
from django.conf import settings

from assistant_site import valkey
from assistant_site.previous_life import MARK, mark_of
from assistant_site.supervised import Probe, Program

CONTROL_PROCESSES = 2
PROBE_S = 2.0
DRAIN_MARGIN_S = 5.0
# In all, what does not stop by itself is gone within 15 s where no stream runs (the gateway then stops at once).
WORKER_STOP_S = 4.0
SERVER_STOP_S = 2.5
ENGINES_GRACE_S = 3.0
ENGINES_STOP_S = 4.5
VALKEY_STOP_S = 2.0

GATEWAY, WORKERS, SERVERS, ENGINES, VALKEY = range(5)  # stop orders
DEFAULT_SETTINGS = "assistant_site.settings"


def environment() -> dict[str, str]:
    """What every program gets: ours, marked, with absolute folders, without the first superuser's password."""
    inherited = {name: value for name, value in os.environ.items() if name != "ASSISTANT_ADMIN_PASSWORD"}
    if inherited.get("DJANGO_SETTINGS_MODULE") == DEFAULT_SETTINGS:
        del inherited["DJANGO_SETTINGS_MODULE"]  # manage.py chooses by command
    if inherited.get("ASSISTANT_MODEL_DIRS"):  # the default follows from the home, whose name may hold a separator
        inherited["ASSISTANT_MODEL_DIRS"] = os.pathsep.join(map(str, settings.ASSISTANT_MODEL_DIRS))
    return {
        **inherited,
        "ASSISTANT_HOME": str(settings.ASSISTANT_HOME),
        "PYTHONUNBUFFERED": "1",
        MARK: mark_of(settings.ASSISTANT_HOME),
    }


def programs() -> list[Program]:
    """Everything but engines, which provisioning starts, and the demo."""
    common = environment()
    servers = [
        _command("console", common, level=1, stop_order=SERVERS, stop_timeout_s=SERVER_STOP_S, ready=_console_answers),
        _command("grpcserver", common, level=2, stop_order=SERVERS, stop_timeout_s=SERVER_STOP_S, ready=_grpc_listens),
        _command(
            "gateway",
            common,
            level=2,
            stop_order=GATEWAY,
            stop_timeout_s=settings.ASSISTANT_DRAIN_S + DRAIN_MARGIN_S,
            ready=_gateway_answers,
        ),
    ]
    return [*_valkey(common), *_celery(common), *servers]


def demo_program() -> Program:
    """Fetches and awaits the demo model, then ends."""
    return Program(
        name="demo",
        argv=[sys.executable, "-m", "assistant_site.demo_process"],
        env=_with_settings(environment()),
        cwd=settings.BASE_DIR,
        stop_order=GATEWAY,
        stop_timeout_s=SERVER_STOP_S,
        once=True,
    )


def _valkey(common: Mapping[str, str]) -> list[Program]:
    if not settings.ASSISTANT_EMBEDDED_VALKEY:
        return []
    place = valkey.from_settings()
    return [
        Program(
            name="valkey",
            argv=place.argv(),
            env=common,
            ready=_valkey_answers,
            stop_order=VALKEY,
            stop_timeout_s=VALKEY_STOP_S,
            hint=valkey.HINT,
        )
    ]


def _celery(common: Mapping[str, str]) -> list[Program]:
    node = settings.ASSISTANT_NODE
    quiet = ["--loglevel", "INFO", "--without-gossip", "--without-mingle"]
    arguments = {
        "worker": ["worker", "-Q", f"control,node.{node}", "-n", f"control@{node}", "-c", str(CONTROL_PROCESSES), *quiet],
        "bulk": ["worker", "-Q", f"bulk.{node}", "-n", f"bulk@{node}", "-c", "1", *quiet],
        "beat": ["beat", "-s", str(settings.ASSISTANT_RUN_DIR / "beat"), "--pidfile=", "--loglevel", "WARNING"],
    }
    return [
        Program(
            name=name,
            argv=[sys.executable, "-m", "celery", "--quiet", "-A", "assistant_site.celery", *rest],
            env=_with_settings(common),
            cwd=settings.BASE_DIR,
            level=1,
            stop_order=WORKERS,
            stop_timeout_s=WORKER_STOP_S,
        )
        for name, rest in arguments.items()
    ]


def _command(name: str, env: Mapping[str, str], *, level: int, stop_order: int, stop_timeout_s: float, ready: Probe) -> Program:
    return Program(
        name=name,
        argv=[sys.executable, str(settings.BASE_DIR / "manage.py"), name],
        env=env,
        cwd=settings.BASE_DIR,
        level=level,
        stop_order=stop_order,
        stop_timeout_s=stop_timeout_s,
        ready=ready,
    )


def _with_settings(common: Mapping[str, str]) -> dict[str, str]:
    return {"DJANGO_SETTINGS_MODULE": DEFAULT_SETTINGS, **common}


def reachable(host: str) -> str:
    """The address by which this machine reaches a server bound to `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # names, nothing is bound here


async def _valkey_answers(_pid: int) -> bool:
    return await valkey.from_settings().ready()


async def _console_answers(_pid: int) -> bool:
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(PROBE_S):
            _, writer = await asyncio.open_unix_connection(str(settings.ASSISTANT_CONSOLE_SOCKET))
        writer.close()
        return True
    return False


async def _grpc_listens(pid: int) -> bool:
    return listens(pid, settings.ASSISTANT_GRPC_ADDR[1])


async def _gateway_answers(pid: int) -> bool:
    """/healthz says 200: not /readyz, which may say no for reasons that are not the gateway's to mend."""
    host, port = settings.ASSISTANT_HTTP_ADDR
    if not listens(pid, port):
        return False
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(PROBE_S):
            reader, writer = await asyncio.open_connection(reachable(host), port)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            status = await reader.readline()
        writer.close()
        return b" 200 " in status
    return False


def listens(pid: int, port: int) -> bool:
    """This process, and not another that answers there, has the listening socket."""
    with suppress(psutil.Error):
        sockets = psutil.Process(pid).net_connections(kind="tcp")
        return any(one.status == psutil.CONN_LISTEN and one.laddr and one.laddr[1] == port for one in sockets)
    return False
