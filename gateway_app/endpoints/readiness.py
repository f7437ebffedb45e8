"""`/healthz`: the process is up. `/readyz`: what it depends on answers; the detail is for this machine only.

`/healthz?stream=5` says so in five events, 100 ms apart and with the headers of every stream of ours: whoever sees them come
all at once has a proxy in between that buffers. It needs no key, so few may be asked for at a time.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Callable
from pathlib import Path

from gateway_app import errors
from gateway_app.endpoints.http import Request
from gateway_app.endpoints.relay import STREAM_HEADERS

_CONSOLE_ANSWERS_WITHIN_S = 1.0
_HEALTHY = b'{"status": "ok"}'
_STREAM = b"stream="
_MOST_EVENTS = 10
_EVENT_EVERY_S = 0.1


class Liveness:
    """The answer of /healthz: at once, or as a stream. at_once: how many streams may run; one more is refused."""

    def __init__(self, at_once: int = 8) -> None:
        self._left = at_once

    async def healthz(self, request: Request) -> None:
        """Touches nothing."""
        query: bytes = request.scope.get("query_string", b"")
        if query.startswith(_STREAM):
            await self._stream(request, _count(query.removeprefix(_STREAM)))
        else:
            await request.answer(_HEALTHY)

    async def _stream(self, request: Request, count: int) -> None:
        if self._left == 0:
            raise errors.server_overloaded(1.0)
        self._left -= 1
        try:
            headers = [*STREAM_HEADERS, (b"x-request-id", request.shown_id)]
            await request.send({"type": "http.response.start", "status": 200, "headers": headers})
            for number in range(1, count + 1):
                await request.send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
                await asyncio.sleep(_EVENT_EVERY_S)
            await request.send({"type": "http.response.body", "body": b""})
        finally:
            self._left += 1


def _count(raw: bytes) -> int:
    """Raises invalid_request."""
    count = int(raw) if raw.isdigit() and len(raw) < 3 else 0
    if not 1 <= count <= _MOST_EVENTS:
        raise errors.invalid_request(f"stream must be a whole number from 1 to {_MOST_EVENTS}.", "stream")
    return count


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
