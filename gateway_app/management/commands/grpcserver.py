"""`manage.py grpcserver`: AssistantService beside the gateway."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from gateway_app.rpc.gateway_client import loopback_origin
from gateway_app.rpc.server import AddressUnusable, serve


class Command(BaseCommand):
    """Serve gRPC until TERM; running calls get ASSISTANT_DRAIN_S seconds."""

    help = "Serve AssistantService (gRPC), forwarding to the gateway on this machine."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--addr", type=_address, metavar="HOST:PORT", default=settings.ASSISTANT_GRPC_ADDR, help="ASSISTANT_GRPC_ADDR"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        origin = loopback_origin(*settings.ASSISTANT_HTTP_ADDR)
        try:
            asyncio.run(serve(options["addr"], origin, settings.VERSION, settings.ASSISTANT_DRAIN_S))
        except AddressUnusable as error:
            raise CommandError(str(error)) from error


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdigit() and int(port) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} must look like 127.0.0.1:50051 or [::1]:50051")
    return host.strip("[]"), int(port)
