"""Refuses request bodies over a limit, on any ASGI server: by Content-Length before a byte is read, else by count."""

from __future__ import annotations

import asyncio
import re
import secrets

from assistant_site.asgi_types import ASGIApplication, Message, Receive, Scope, Send
from assistant_site.http_errors import JSON, error_body

# How long a refused client may go on sending: one that sends everything before it reads can then read the answer.
DISCARD_S = 2.0
_OWN_ID = re.compile(rb"[A-Za-z0-9_.-]{1,64}")


class BodyLimit:
    """Wraps an application; a request body of more than `limit` bytes is answered with 413.

    The application learns of a refusal in mid-body as http.disconnect, and what it sends afterwards is dropped.
    If it had begun to answer already, only the disconnect tells.
    """

    def __init__(self, application: ASGIApplication, limit: int) -> None:
        self._application = application
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            length, chunked = _framing(scope)
            if length > self._limit:
                await _refuse(self._limit, scope, receive, send)
                return
            if chunked:
                await _Counted(self._limit, scope, receive, send).run(self._application)
                return
        await self._application(scope, receive, send)


def _framing(scope: Scope) -> tuple[int, bool]:
    """(Content-Length or 0, whether the length is unknown); the server has refused malformed headers already."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value), False
        if name == b"transfer-encoding":
            return 0, True
    return 0, False


class _Counted:
    """One request whose length shows only as it arrives."""

    def __init__(self, limit: int, scope: Scope, receive: Receive, send: Send) -> None:
        self._limit = limit
        self._scope = scope
        self._receive = receive
        self._send = send
        self._size = 0
        self._started = False
        self._refused = False

    async def run(self, application: ASGIApplication) -> None:
        await application(self._scope, self.receive, self.send)
        if self._refused and not self._started:
            await _finish_refusal(self._receive, self._send)

    async def receive(self) -> Message:
        if self._refused:
            return {"type": "http.disconnect"}
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if self._size <= self._limit:
            return message
        self._refused = True
        if not self._started:
            await _begin_refusal(self._limit, self._scope, self._send)
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._refused and not self._started:
            return
        self._started = True
        await self._send(message)


async def _refuse(limit: int, scope: Scope, receive: Receive, send: Send) -> None:
    await _begin_refusal(limit, scope, send)
    await _finish_refusal(receive, send)


async def _begin_refusal(limit: int, scope: Scope, send: Send) -> None:
    """The whole answer goes out now; only its formal end waits for _finish_refusal."""
    body = error_body(413, f"The request body is larger than {limit} bytes.", "request_too_large")
    headers = [(b"content-type", JSON), (b"content-length", b"%d" % len(body)), (b"connection", b"close"), _request_id(scope)]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _request_id(scope: Scope) -> tuple[bytes, bytes]:
    """As every other answer has it: the client's own if it is a sane one, else one of ours."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _OWN_ID.fullmatch(value):
            return name, value
    return b"x-request-id", b"req-" + secrets.token_hex(12).encode("ascii")


async def _finish_refusal(receive: Receive, send: Send) -> None:
    try:
        async with asyncio.timeout(DISCARD_S):
            while (await receive()).get("more_body", False):
                pass
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
