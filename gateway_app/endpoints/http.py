"""One request of the data plane as the endpoints see it: headers, body, a JSON answer."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from gateway_app import errors

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

_OWN_ID = re.compile(rb"[A-Za-z0-9_.-]{1,64}")
_JSON = (b"content-type", b"application/json")


class ClientGone(Exception):
    """The client closed its connection; nobody is left to answer."""


class Request:
    """One HTTP request. id: unique for ever, ours. shown_id: what x-request-id says, the client's own if it sent a sane one.

    They differ because a client may send the same id twice, and what is metered under `id` is counted once.
    """

    __slots__ = ("headers", "id", "method", "path", "receive", "received", "received_at", "scope", "send", "shown_id")

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.id = request_id
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.received = time.monotonic()
        self.received_at = time.time()
        own = self.header(b"x-request-id")
        self.shown_id = own if own is not None and _OWN_ID.fullmatch(own) else request_id.encode()

    def header(self, name: bytes) -> bytes | None:
        """The first header of that lower-case name."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    async def body(self, limit: int) -> bytes:
        """The whole body. Raises request_too_large past `limit` bytes, and ClientGone."""
        declared = self.header(b"content-length")
        if declared is not None and declared.isdigit() and int(declared) > limit:
            raise errors.request_too_large(limit)
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body: bytes = message.get("body", b"")
        if not message.get("more_body"):
            if len(body) > limit:
                raise errors.request_too_large(limit)
            return body
        return await self._rest(body, limit)

    async def _rest(self, first: bytes, limit: int) -> bytes:
        parts, size, more = [first], len(first), True
        while more and size <= limit:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
        if size > limit:
            raise errors.request_too_large(limit)
        return b"".join(parts)

    async def answer(self, body: bytes, status: int = 200, headers: Headers = ()) -> None:
        """A JSON answer, whole."""
        length = (b"content-length", b"%d" % len(body))
        listed = [_JSON, length, (b"x-request-id", self.shown_id), *headers]
        await self.send({"type": "http.response.start", "status": status, "headers": listed})
        await self.send({"type": "http.response.body", "body": body})

    async def fail(self, error: errors.ApiError) -> None:
        """An error object with its status and headers."""
        await self.answer(error.body(), error.status, error.headers)
