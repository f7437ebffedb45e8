"""One HTTP/1.1 connection to an upstream, one exchange at a time, over asyncio's protocol API and the httptools parser.

Bytes go from the socket through the parser into a list that one reader empties; nothing is scheduled per chunk but the wake-up
of that reader. What is held is bounded: past HIGH_WATER the socket is paused until the reader has taken it all.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final, cast

import httptools

from gateway_app.upstream.origin import Origin

HIGH_WATER: Final = 256 * 1024  # bytes held before the socket is paused
MAX_HEAD: Final = 64 * 1024  # bytes of an answer's head, and of any stretch in which nothing of the answer comes
_JOIN: Final = 64 * 1024  # a body up to this size is copied behind its head to leave in one segment


class UpstreamFailure(Exception):
    """No answer, or not all of it."""


class ConnectFailed(UpstreamFailure):
    """No connection came about, so nothing was sent and another try is safe."""


class UpstreamBroken(UpstreamFailure):
    """The upstream went away, said nonsense or was too slow after the request had gone out."""


class Connection(asyncio.Protocol):
    """Made by the pool; begin(), then head(), then next_chunk() until it gives b"".

    complete: the answer has come whole. keep_alive: and the upstream will take another request. silent: not one byte of an
    answer has come. failure: why the exchange cannot go on. closed: the connection is gone or going.
    on_gone is called when the connection has gone; not for one that was given up while connecting (uvloop then tells nobody).
    """

    def __init__(self, origin: Origin, loop: asyncio.AbstractEventLoop, on_gone: Callable[[Connection], None]) -> None:
        self.origin = origin
        self.idle_since = 0.0
        self.closed = False
        self._loop = loop
        self._on_gone = on_gone
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._reset(bodiless=False)
        self.complete = True

    def _reset(self, *, bodiless: bool) -> None:
        self._bodiless = bodiless  # HEAD: the head is all there is, whatever its Content-Length says
        self._parts: list[bytes] = []
        self._held = 0
        self._paused = False
        self._quiet = 0  # bytes since the parser last gave something of the answer
        self._head_done = False
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False
        self.keep_alive = False
        self.silent = True
        self.failure: UpstreamBroken | None = None

    # --- for the pool and the response

    def begin(self, method: bytes, head: bytes, body: bytes) -> None:
        """Send a request. The connection must be idle and open."""
        self._reset(bodiless=method == b"HEAD")
        assert self._transport is not None
        if len(body) <= _JOIN:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    async def head(self) -> None:
        """Until status and headers are there. Raises UpstreamBroken."""
        while not self._head_done:
            await self._progress()

    async def next_chunk(self) -> bytes:
        """All of the body that has come since the last call, at least one byte; b"" at its end. Raises UpstreamBroken."""
        while not self._parts:
            if self.complete:
                return b""
            await self._progress()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._held = 0
        if self._paused:
            self._paused = False
            if self._transport is not None and not self.closed:
                self._transport.resume_reading()
        return data

    def reusable(self) -> bool:
        """Whether another request may be sent now."""
        if not (self.complete and self.keep_alive) or self.closed or self._paused or self._transport is None:
            return False
        return not self._transport.is_closing() and self._transport.get_write_buffer_size() == 0

    def abort(self) -> None:
        """Close at once; who waits for the answer is told."""
        self.closed = True
        self._fail("the connection was closed on this side")
        if self._transport is not None:
            self._transport.abort()

    # --- from the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self.closed:  # given up while connecting
            self._transport.abort()
            return
        raw = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if self.complete or self.failure is not None:
            self.abort()  # nobody asked for these bytes; what came before them can still be read
            return
        self.silent = False
        self._quiet += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._break("the upstream switched protocols")
        except httptools.HttpParserError as error:
            self.keep_alive = False
            if not self.complete:
                self._break(f"the upstream did not speak HTTP: {error}")
        if self._quiet > MAX_HEAD and not self.complete:
            self._break(f"the upstream sent more than {MAX_HEAD} bytes of headers")
        if self._head_done:
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if not self.complete:
            if exc is None and self.failure is None and self._head_done and not self._framed():
                self.complete = True  # the body's end is the connection's
            else:
                self._fail("the upstream closed the connection" if exc is None else f"the connection broke: {exc}")
        self.keep_alive = False
        self._transport = None
        self._wake()
        self._on_gone(self)

    # --- from the parser

    def on_message_begin(self) -> None:
        if self.complete:
            self.keep_alive = False  # a second answer to one request

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_done:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._head_done:
            return
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            self.headers = []  # interim, such as 100 Continue; the answer follows
            return
        if sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD:
            self._break(f"the upstream sent more than {MAX_HEAD} bytes of headers")
            return
        self.status = status
        self._head_done = True
        self._quiet = 0
        if self._bodiless:
            self.complete = True

    def on_body(self, data: bytes) -> None:
        if self.complete:
            return
        self._quiet = 0
        self._parts.append(data)
        self._held += len(data)
        if self._held > HIGH_WATER and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self._head_done and not self.complete:
            self.complete = True
            self.keep_alive = self._parser.should_keep_alive()

    # --- inside

    async def _progress(self) -> None:
        """Until something has come. Raises the failure."""
        if self.failure is not None:
            raise self.failure
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, reason: str) -> None:
        if self.failure is None and not self.complete:
            self.failure = UpstreamBroken(reason)
        self._wake()

    def _break(self, reason: str) -> None:
        self._fail(reason)
        self.abort()

    def _framed(self) -> bool:
        """Whether the answer tells where its body ends."""
        for name, value in self.headers:
            if name == b"content-length" or (name == b"transfer-encoding" and value.lower().endswith(b"chunked")):
                return True
        return False
