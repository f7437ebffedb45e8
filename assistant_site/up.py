"""`manage.py up`: the whole platform on one machine, from an empty home to a working curl, and back to nothing.

lock → sweep of a previous life → addresses → database → admin and key → programs by level → demo model → ready block.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from django.conf import settings
from django.core.management import call_command
from django.db import DatabaseError, connections

from assistant_site import demo, env, platform_programs
from assistant_site.binding import AddressInUse, bind_tcp
from assistant_site.first_start import ADMIN, Admin, ensure_admin, quick_start_key
from assistant_site.platform_programs import ENGINES, ENGINES_GRACE_S, ENGINES_STOP_S
from assistant_site.previous_life import end_survivors, mark_of, only_one
from assistant_site.program_log import Output
from assistant_site.supervisor import StartFailed, StopStep, Supervisor
from models_app import provisioning
from models_app.models import Instance, ModelAlias, ModelConfig

LAST_GRACE_S = 1.0

T = TypeVar("T")


class CannotStart(Exception):
    """str() says what is in the way and what to do."""


@dataclass(frozen=True)
class Welcome:
    """What the ready block tells."""

    admin: Admin
    key: str
    keep_engines: bool = False


def run(keep_engines: bool = False) -> int:
    """Run until told to stop: the exit code. Raises CannotStart and AlreadyRunning before anything was started.

    keep_engines: the stop leaves the engine processes alone. Whatever state they are in, the next life resolves: their rows
    are its to read, a shim needs nobody, and one that was starting or draining is looked at again.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the event loop takes over
    output = Output(sys.stdout.fileno(), colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    try:
        with only_one(settings.ASSISTANT_RUN_DIR / "up.lock"):
            return _run_alone(output, keep_engines)
    except KeyboardInterrupt:
        return 0
    finally:
        output.close()


def _run_alone(output: Output, keep_engines: bool) -> int:
    mark = mark_of(settings.ASSISTANT_HOME)
    ended, left = end_survivors(mark)
    if ended:
        output.write(f"Ended what a previous life left behind: {ended} process{'es' if ended > 1 else ''}.\n".encode())
    if left:
        raise CannotStart(f"Processes {', '.join(map(str, left))} of a previous life cannot be ended. End them, then try again.")
    check_addresses()
    welcome = prepare_database()
    code = asyncio.run(_serve(output, replace(welcome, keep_engines=keep_engines)))
    _, left = end_survivors(mark, LAST_GRACE_S)
    if keep_engines:
        output.write(f"{_ask_database(goodbye)}\n".encode())
    return 1 if left else code


def check_addresses() -> None:
    """CannotStart names what is in the way of the public addresses."""
    for setting in ("ASSISTANT_HTTP_ADDR", "ASSISTANT_GRPC_ADDR"):
        host, port = getattr(settings, setting)
        try:
            bind_tcp(host, port, setting).close()
        except AddressInUse as error:
            raise CannotStart(str(error)) from error
        except OSError as error:
            raise CannotStart(f"Cannot listen on {_shown(host, port)}: {error.strerror}. Set {setting}.") from error


def prepare_database() -> Welcome:
    """Migrate, and make what a new installation gets once."""
    try:
        call_command("migrate", verbosity=0, interactive=False)
        admin = ensure_admin(settings.ASSISTANT_HOME)
        return Welcome(admin, quick_start_key(settings.ASSISTANT_HOME, new_installation=admin.created))
    except DatabaseError as error:
        raise CannotStart(f"The database does not work: {str(error).strip()}. Check DATABASE_URL.") from error
    finally:
        connections.close_all()


async def _serve(output: Output, welcome: Welcome) -> int:
    supervisor = Supervisor(
        platform_programs.programs(),
        output=output,
        log_folder=env.private_folder(settings.ASSISTANT_LOG_DIR),
        steps=[] if welcome.keep_engines else [StopStep("engines", ENGINES, _stop_engines, ENGINES_STOP_S)],
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGINT, lambda: supervisor.hurry() if stop.is_set() else stop.set())
    failure = await _until_stopped(stop, supervisor, output, welcome)
    supervisor.say("stopping" if not failure else f"{failure}\nstopping")
    await supervisor.stop()
    return 0 if supervisor.clean and not failure else 1


async def _until_stopped(stop: asyncio.Event, supervisor: Supervisor, output: Output, welcome: Welcome) -> str:
    """Start everything and wait for the stop: why the start failed, or nothing."""
    start = asyncio.create_task(_start(supervisor, output, welcome))
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([start, stopped], return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            start.result()
        await stopped
    except StartFailed as error:
        return str(error)
    finally:
        start.cancel()
        stopped.cancel()
        await asyncio.gather(start, stopped, return_exceptions=True)
    return ""


async def _start(supervisor: Supervisor, output: Output, welcome: Welcome) -> None:
    supervisor.say("starting; Ctrl-C stops")
    await supervisor.start()
    if await asyncio.to_thread(_ask_database, demo.wanted):
        await supervisor.watched(supervisor.run_once(platform_programs.demo_program()))
    block = ready_block(welcome, await asyncio.to_thread(_ask_database, model_to_try))
    output.write(block.encode())


def _ask_database(question: Callable[[], T]) -> T:
    """In a thread of the pool, whose connection nobody needs afterwards."""
    try:
        return question()
    finally:
        connections.close_all()


def model_to_try() -> str:
    """The name for the printed curl: the demo's short one, else any model's, else nothing."""
    enabled = ModelConfig.objects.enabled()
    if ModelAlias.objects.filter(name=demo.ALIAS, model__in=enabled).exists():
        return demo.ALIAS
    return enabled.values_list("name", flat=True).first() or ""


def _stop_engines(hurry: bool) -> None:
    _ask_database(lambda: provisioning.stop_everything(settings.ASSISTANT_NODE, 0 if hurry else ENGINES_GRACE_S))


def goodbye() -> str:
    """What a stop that keeps engines leaves behind, in one sentence."""
    try:
        count = sum(bool(provisioning.living(one)) for one in _kept())
    except DatabaseError as error:
        return f"Engines are left running; how many is not known: {str(error).strip()}."
    left = f"{count} engine{'' if count == 1 else 's'}"
    return f"{left} left running; the next start takes them over, without --keep-engines its stop ends them."


def _kept() -> list[Instance]:
    return list(Instance.objects.with_process().filter(node__name=settings.ASSISTANT_NODE))


def ready_block(welcome: Welcome, model: str) -> str:
    """The few lines that a newcomer needs. The password is in them once: when it was made up."""
    base = f"http://{_shown(*settings.ASSISTANT_HTTP_ADDR)}"
    lines = [
        "",
        "  Assistant is ready.",
        "",
        f"    API       {base}/v1",
        f"    Admin     {base}/admin/   {_password(welcome.admin)}",
        f"    API docs  {base}/api/v1/docs/",
        f"    gRPC      {_shown(*settings.ASSISTANT_GRPC_ADDR)}",
        "",
        *(f"    {line}" for line in _try_it(base, welcome.key, model)),
        "",
        "  Ctrl-C stops everything but the engines." if welcome.keep_engines else "  Ctrl-C stops everything.",
        "",
    ]
    return "\n".join(lines) + "\n"


def _password(admin: Admin) -> str:
    if admin.new_password:
        return f"user {ADMIN}, password {admin.new_password} (kept in {admin.password_file})"
    if admin.password_file:
        return f"user {ADMIN}, first password in {admin.password_file}"
    return f"user {ADMIN}, password as in ASSISTANT_ADMIN_PASSWORD" if admin.created else ""


def _try_it(base: str, key: str, model: str) -> list[str]:
    if not model:
        return [f"No model is enabled yet: add one at {base}/admin/models_app/modelconfig/"]
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Say hello."}]})
    hint = [] if key else [f"Make a key at {base}/admin/models_app/apikey/ and put it in place of YOUR_KEY:"]
    return [
        *hint,
        f"curl {base}/v1/chat/completions \\",
        f"  -H 'Authorization: Bearer {key or 'YOUR_KEY'}' -H 'Content-Type: application/json' \\",
        f"  -d '{body}'",
    ]


def _shown(host: str, port: int) -> str:
    """An address as one types it on this machine."""
    host = platform_programs.reachable(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
