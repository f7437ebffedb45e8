"""`/healthz`: the process is up. `/readyz`: what it depends on answers; the detail is for this machine only."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Callable
from pathlib import Path

from gateway_app.endpoints.http import Request

_CONSOLE_ANSWERS_WITHIN_S = 1.0
_HEALTHY = b'{"status": "ok"}'


async def healthz(request: Request) -> None:
    """Touches nothing."""
    await request.answer(_HEALTHY)


class Readiness:
    """The answer of /readyz: 200 while every check holds, else 503. checks: name → whether it holds, asked each time."""

    def __init__(self, checks: dict[str, Callable[[], bool]], console_socket: Path) -> None:
        self._checks = checks
        self._console_socket = console_socket

    async def readyz(self, request: Request) -> None:
        """Whether new traffic should be sent here."""
        results = {name: check() for name, check in self._checks.items()}
        results["console"] = await self._console_answers()
        ready = all(results.values())
        answer: dict[str, object] = {"status": "ready" if ready else "unavailable"}
        if _is_local(request):
            answer["checks"] = results
        await request.answer(json.dumps(answer).encode(), 200 if ready else 503)

    async def _console_answers(self) -> bool:
        try:
            async with asyncio.timeout(_CONSOLE_ANSWERS_WITHIN_S):
                _, writer = await asyncio.open_unix_connection(self._console_socket)
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True


def _is_local(request: Request) -> bool:
    """Whether the client is on this machine. Behind a proxy nobody is: everyone's address is the proxy's."""
    if request.header(b"x-forwarded-for") is not None or request.header(b"forwarded") is not None:
        return False
    client = request.scope.get("client")
    if not client or not client[0]:
        return True  # a Unix socket
    try:
        return ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False
