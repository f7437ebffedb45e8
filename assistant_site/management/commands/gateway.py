"""manage.py gateway: the public address, the data plane behind it, and the relay to the console."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from django.db import Error as DatabaseError

from assistant_site import env
from assistant_site.binding import AddressInUse, bind_tcp, is_loopback
from assistant_site.runner import Serving, run

logger = logging.getLogger(__name__)


class Command(BaseCommand):
    help = "Serve /v1 and relay every other path to the console."
    requires_system_checks = ()  # the console runs them; here they would only delay the start

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--addr", help="host:port to listen on instead of ASSISTANT_HTTP_ADDR")
        parser.add_argument("--server", choices=("daphne", "uvicorn"), help="instead of ASSISTANT_ASGI_SERVER")

    def handle(self, *args: Any, **options: Any) -> None:
        host, port = _address(options["addr"])
        try:
            listener = bind_tcp(host, port, "ASSISTANT_HTTP_ADDR")
        except (AddressInUse, OSError) as error:
            raise CommandError(str(error)) from error
        if not is_loopback(listener.socket.getsockname()[0]):
            logger.warning("%s can be reached from other machines, without TLS: put a TLS proxy in front of it.", listener.name)
        from gateway_app.gateway import Gateway  # its imports are for a process that could bind

        serving = Serving(
            server=options["server"] or settings.ASSISTANT_ASGI_SERVER,
            drain_s=settings.ASSISTANT_DRAIN_S,
            max_body=settings.ASSISTANT_MAX_BODY,
        )
        try:
            code = run(Gateway.from_settings(), listener, serving)
        except DatabaseError as error:
            raise CommandError(f"No first snapshot: {error}. Check DATABASE_URL, run manage.py migrate.") from error
        if code:
            raise SystemExit(code)


def _address(given: str | None) -> tuple[str, int]:
    if given is None:
        host, port = settings.ASSISTANT_HTTP_ADDR
        return str(host), int(port)
    try:
        return env.address("--addr", given)
    except ImproperlyConfigured as error:
        raise CommandError(str(error)) from error
