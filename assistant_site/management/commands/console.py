"""manage.py console: admin, REST API, console pages and their WebSockets on a private socket that the gateway relays to."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from assistant_site.asgi_types import Receive, Scope, Send
from assistant_site.binding import AddressInUse, bind_unix
from assistant_site.runner import Serving, run

NICE = 10


class Console:
    """The console as a service: Django has nothing to start or stop."""

    async def application(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._application(scope, receive, send)

    async def start(self) -> None:
        from assistant_site.asgi import application  # needs Django set up

        self._application = application

    def drain(self) -> None:
        """Nothing routes to us but the relay, and it sees the socket close."""

    async def stop(self) -> None:
        """Nothing to stop."""


def yield_to_the_gateway() -> None:
    """Where both want a processor, requests come before pages.

    Linux may schedule by session first (autogroup), and then a process's own nice value counts only within its session.
    """
    os.nice(NICE)
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(NICE))


class Command(BaseCommand):
    help = "Serve the admin and the console pages on a private Unix socket."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--addr", help="path of the Unix socket instead of the one under ASSISTANT_HOME")

    def handle(self, *args: Any, **options: Any) -> None:
        path = Path(options["addr"] or settings.ASSISTANT_CONSOLE_SOCKET)
        try:
            listener = bind_unix(path)
        except (AddressInUse, OSError) as error:
            raise CommandError(str(error)) from error
        yield_to_the_gateway()
        serving = Serving("daphne", settings.ASSISTANT_DRAIN_S, settings.ASSISTANT_MAX_BODY, forwarded=True)
        code = run(Console(), listener, serving)
        if code:
            raise SystemExit(code)
