"""HTTP/1.1 client of the data plane: a keep-alive pool over raw asyncio protocols, with nothing in it but what a relay needs.

No redirects, cookies, decompression or retries of its own, save one: a pooled connection that turns out to have been closed
by the other side before any byte of an answer is replaced by a fresh one, once.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator
from typing import Final

from gateway_app.upstream.connection import ConnectFailed, Connection, UpstreamBroken, UpstreamFailure
from gateway_app.upstream.origin import Headers, Origin, request_head

__all__ = [
    "BodyTooLarge",
    "ConnectFailed",
    "Origin",
    "UpstreamBroken",
    "UpstreamFailure",
    "UpstreamPool",
    "UpstreamResponse",
    "UpstreamTimeout",
]

IDLE_S: Final = 4.0  # below the 5 s after which llama.cpp's server closes an idle connection


class UpstreamTimeout(UpstreamBroken):
    """No answer began within the time allowed."""


class BodyTooLarge(UpstreamBroken):
    """The body is longer than the reader would take."""


class UpstreamPool:
    """Connections to any number of origins. Belongs to the event loop it is first used on.

    connect_timeout_s: for address look-up, TCP and TLS together. max_idle: kept per origin; more are closed.
    idle_s: how long one is kept. tls: how https upstreams are verified; the system's certificates by default.
    """

    def __init__(
        self,
        *,
        connect_timeout_s: float = 5.0,
        max_idle: int = 64,
        idle_s: float = IDLE_S,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._max_idle = max_idle
        self._idle_s = idle_s
        self._tls = tls
        self._open: set[Connection] = set()
        self._idle: dict[Origin, list[Connection]] = {}  # the most recently used last
        self._sweeper: asyncio.TimerHandle | None = None
        self._all_gone: asyncio.Future[None] | None = None
        self._closed = False

    @property
    def open_connections(self) -> int:
        """Connections made and not yet gone, idle ones too."""
        return len(self._open)

    @property
    def idle_connections(self) -> int:
        """Connections waiting for a request."""
        return sum(map(len, self._idle.values()))

    async def send(
        self,
        origin: Origin,
        method: bytes,
        target: bytes,
        headers: Headers,
        body: bytes,
        *,
        first_byte_timeout_s: float | None = None,
    ) -> UpstreamResponse:
        """Send a request; returns when status and headers of the answer are there.

        headers: all but Host, Content-Length and Connection, which are written here. Raises ConnectFailed when nothing was
        sent, UpstreamBroken after that, ValueError for a request that cannot be written. Cancelled, it closes the connection.
        """
        head = request_head(origin, method, target, headers, len(body))
        connection = self._take(origin)
        if connection is not None:
            try:
                return await self._exchange(connection, method, head, body, first_byte_timeout_s)
            except UpstreamTimeout:
                raise
            except UpstreamBroken:
                if not connection.silent:
                    raise
            try:
                connection = await self._connect(origin)
            except ConnectFailed as refused:
                # The request may have reached the upstream on the stale connection, so "nothing was sent" would be a lie.
                raise UpstreamBroken(f"the upstream went away: {refused}") from refused
        else:
            connection = await self._connect(origin)
        return await self._exchange(connection, method, head, body, first_byte_timeout_s)

    async def close(self) -> None:
        """End every connection, those in use too, and wait until they have gone. Nothing can be sent afterwards."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for connection in list(self._open):
            connection.abort()
        if self._open:
            self._all_gone = asyncio.get_running_loop().create_future()
            await self._all_gone

    def take_back(self, connection: Connection) -> None:
        """For UpstreamResponse: an exchange is over; keep the connection for the next one if it is fit for it."""
        idle = self._idle.setdefault(connection.origin, [])
        if len(idle) >= self._max_idle or not connection.reusable():
            connection.abort()
            if not idle:
                del self._idle[connection.origin]
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        idle.append(connection)
        if self._sweeper is None:
            self._sweeper = loop.call_later(self._idle_s, self._sweep)

    async def _exchange(
        self, connection: Connection, method: bytes, head: bytes, body: bytes, timeout_s: float | None
    ) -> UpstreamResponse:
        answered = False
        try:
            connection.begin(method, head, body)
            if timeout_s is None:
                await connection.head()
            else:
                await _within(timeout_s, connection)
            answered = True
        finally:
            if not answered:
                connection.abort()
        return UpstreamResponse(self, connection)

    async def _connect(self, origin: Origin) -> Connection:
        if self._closed:
            raise ConnectFailed("the gateway is stopping")
        loop = asyncio.get_running_loop()
        connection = Connection(origin, loop, self._gone)
        context = self._context() if origin.tls else None
        name = (origin.server_hostname or origin.host) if origin.tls else None
        connected = False
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await loop.create_connection(lambda: connection, origin.host, origin.port, ssl=context, server_hostname=name)
            connected = not (connection.closed or self._closed)
        except TimeoutError:
            raise ConnectFailed(f"{origin.host}:{origin.port} did not accept a connection in time") from None
        except (OSError, UnicodeError) as error:
            raise ConnectFailed(f"cannot connect to {origin.host}:{origin.port}: {error}") from error
        finally:
            if not connected:
                connection.abort()
        if not connected:
            raise ConnectFailed(f"the connection to {origin.host}:{origin.port} was closed at once")
        self._open.add(connection)
        return connection

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls

    def _take(self, origin: Origin) -> Connection | None:
        """The most recently used idle connection that is still good."""
        idle = self._idle.get(origin)
        if idle is None:
            return None
        oldest = asyncio.get_running_loop().time() - self._idle_s
        found = None
        while idle and found is None:
            connection = idle.pop()
            if connection.idle_since >= oldest and connection.reusable():
                found = connection
            else:
                connection.abort()
        if not idle:
            del self._idle[origin]
        return found

    def _sweep(self) -> None:
        """Close what has been idle too long, and come again when the next will have been."""
        loop = asyncio.get_running_loop()
        oldest = loop.time() - self._idle_s
        self._sweeper = None
        for origin, idle in list(self._idle.items()):
            stale = sum(connection.idle_since <= oldest for connection in idle)
            for connection in idle[:stale]:
                connection.abort()
            del idle[:stale]
            if not idle:
                del self._idle[origin]
        if self._idle:
            first = min(idle[0].idle_since for idle in self._idle.values())
            self._sweeper = loop.call_at(first + self._idle_s, self._sweep)

    def _gone(self, connection: Connection) -> None:
        self._open.discard(connection)
        idle = self._idle.get(connection.origin)
        if idle is not None and connection in idle:
            idle.remove(connection)
            if not idle:
                del self._idle[connection.origin]
        if self._all_gone is not None and not self._open and not self._all_gone.done():
            self._all_gone.set_result(None)


async def _within(seconds: float, connection: Connection) -> None:
    try:
        async with asyncio.timeout(seconds):
            await connection.head()
    except TimeoutError:
        raise UpstreamTimeout("the upstream did not answer in time") from None


class UpstreamResponse:
    """An answer whose head has come. Whoever holds it must read it to its end, release() it or abort() it.

    headers: names in lower case, in order. Reading to the end releases it; a reader that fails, stops early or is cancelled
    closes the connection. release() and abort() may be called again and after that; only the first call counts.
    """

    __slots__ = ("_connection", "_pool", "headers", "status")

    def __init__(self, pool: UpstreamPool, connection: Connection) -> None:
        self.status = connection.status
        self.headers = connection.headers
        self._pool = pool
        self._connection: Connection | None = connection

    def header(self, name: bytes) -> bytes | None:
        """The first header of this name, given in lower case."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    async def read(self, limit: int) -> bytes:
        """The rest of the body. Raises UpstreamBroken, BodyTooLarge past limit bytes."""
        parts: list[bytes] = []
        size = 0
        async for data in self.chunks():
            parts.append(data)
            size += len(data)
            if size > limit:
                self.abort()
                raise BodyTooLarge(f"the answer is longer than {limit} bytes")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes, all that is there at a time. Raises UpstreamBroken. Close it (aclosing) if you stop early."""
        connection = self._connection
        if connection is None:
            raise UpstreamBroken("the answer was released before it was read")
        ended = False
        try:
            while data := await connection.next_chunk():
                yield data
            ended = True
        finally:
            if ended:
                self.release()
            else:
                self.abort()

    def release(self) -> None:
        """Done with it: pool the connection if the answer is complete, the upstream keeps it open and it was no event stream.

        llama.cpp's server announces keep-alive and closes after every event stream all the same.
        """
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if (self.header(b"content-type") or b"").lower().startswith(b"text/event-stream"):
            connection.abort()
        else:
            self._pool.take_back(connection)

    def abort(self) -> None:
        """Close the connection now."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()
