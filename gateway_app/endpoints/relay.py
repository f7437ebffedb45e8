"""The client's side of one streamed answer: the status is held back, then the connection is kept warm and watched."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from gateway_app.endpoints.http import Send
from gateway_app.endpoints.interruption import Interruption, Reason

PING = b": ping\n\n"
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
]


class StreamAborted(Exception):
    """An answer that has begun cannot be completed, and the client has been told in-band where it still reads. The connection
    must end abnormally, without a terminating chunk, so that nobody takes what came for a whole answer.
    """


@dataclass(frozen=True, slots=True)
class Patience:
    """Times in seconds.

    hold_s: from receipt until a stream's status is sent whatever has come. ping_s: between two pings.
    slow_reader_s: how long a client may not read at all; sweep_s: how often that is looked at.
    watch_after_s: from admission until a plain call's client is watched.
    """

    hold_s: float = 8.0
    ping_s: float = 10.0
    slow_reader_s: float = 60.0
    sweep_s: float = 5.0
    watch_after_s: float = 0.05


class Outlet:
    """Sends one event stream. One timer and no more while content flows; pings only while it does not."""

    __slots__ = (
        "_flowing",
        "_hold",
        "_lock",
        "_patience",
        "_pinger",
        "_request_id",
        "_send",
        "blocked_since",
        "committed",
        "interruption",
    )

    def __init__(self, send: Send, request_id: bytes, received: float, patience: Patience, interruption: Interruption) -> None:
        self._send = send
        self._request_id = request_id
        self._patience = patience
        self.interruption = interruption
        self.committed = False
        self._flowing = False
        self.blocked_since: float | None = None  # since when the client has not taken what was sent to it
        self._lock: asyncio.Lock | None = None  # only while pings are sent too
        self._pinger: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        self._hold: asyncio.TimerHandle | None = loop.call_at(received + patience.hold_s, self._begin_pings)

    async def write(self, data: bytes, last: bool = False) -> None:
        """Send these whole events; the first call commits the status 200."""
        if self._lock is None:
            await self._put(data, last)
        else:
            async with self._lock:
                await self._put(data, last)

    def content_flows(self) -> None:
        """No pings from here on."""
        self._flowing = True
        if self._hold is not None:
            self._hold.cancel()
            self._hold = None
        # A ping on its way is not cut: it may be what commits the status.
        if self._pinger is not None and self._lock is not None and not self._lock.locked():
            self._pinger.cancel()

    def close(self) -> None:
        """End everything of this stream."""
        self.content_flows()
        if self._pinger is not None:
            self._pinger.cancel()

    async def _put(self, data: bytes, last: bool) -> None:
        self.blocked_since = time.monotonic()
        if not self.committed:
            self.committed = True
            headers = [*STREAM_HEADERS, (b"x-request-id", self._request_id)]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        self.blocked_since = None

    def _begin_pings(self) -> None:
        self._hold = None
        self._lock = asyncio.Lock()
        self._pinger = asyncio.get_running_loop().create_task(self._ping(self._lock))
        self._pinger.add_done_callback(_settled)

    async def _ping(self, lock: asyncio.Lock) -> None:
        if self.committed:
            await asyncio.sleep(self._patience.ping_s)
        while not self._flowing:
            async with lock:
                await self._put(PING, last=False)
            await asyncio.sleep(self._patience.ping_s)


def _settled(pinger: asyncio.Task[None]) -> None:
    """A ping that could not be sent means that the client is gone, which the request itself learns."""
    if not pinger.cancelled():
        pinger.exception()


class SlowReaders:
    """Ends streams whose client has stopped reading: looks at all of them now and then, so that no chunk needs a timer."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._outlets: set[Outlet] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    def watch(self, outlet: Outlet) -> None:
        self._outlets.add(outlet)

    def forget(self, outlet: Outlet) -> None:
        self._outlets.discard(outlet)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._patience.sweep_s)
            limit = time.monotonic() - self._patience.slow_reader_s
            for outlet in self._outlets:
                if outlet.blocked_since is not None and outlet.blocked_since < limit:
                    outlet.interruption.interrupt(Reason.SLOW_READER)
