"""Many streams at once whose events come at a pace: when the first arrives, how late each is, whether all end properly."""

from __future__ import annotations

import asyncio
import gc
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, cast

import uvloop

from tests.bench.load import HOST, STREAM_END, LoadFailed, Target, percentile
from tests.bench.upstream import EVENTS, PACE_S, STAMP_DIGITS

PATIENCE_S: Final = 60.0  # for all streams of a round to end
_STAMP: Final = re.compile(rb'"content":"(\d{%d})"' % STAMP_DIGITS)
_DONE: Final = b"data: [DONE]"
_KEPT: Final = 64  # bytes of the last piece in which a mark may have begun


@dataclass(frozen=True)
class Paced:
    """What the readers saw. Times in ms; late: from the writing of an event to its arrival."""

    streams: int
    first_p50_ms: float
    first_p99_ms: float
    late_p50_ms: float
    late_p99_ms: float
    events: int
    broken: int


@dataclass
class _Tally:
    first_ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    broken: int = 0


class _Reader(asyncio.Protocol):
    """One stream, from request to last chunk."""

    def __init__(self, request: bytes, tally: _Tally) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._tally = tally
        self._tail = b""
        self._seen = 0
        self._done = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._began = time.monotonic_ns()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        text = self._tail + data
        read = 0
        for stamp in _STAMP.finditer(text):
            if not self._seen:
                self._tally.first_ms.append((now - self._began) / 1e6)
            self._seen += 1
            self._tally.late_ms.append((now - int(stamp[1])) / 1e6)
            read = stamp.end()
        self._done = self._done or _DONE in text
        self._tail = text[max(read, len(text) - _KEPT) :]
        if text.endswith(STREAM_END):
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._tally.broken += not (self._done and self._seen == EVENTS)
        if not self.over.done():
            self.over.set_result(None)


def run(target: Target, *, streams: int, seconds: float) -> Paced:
    """Rounds of so many streams begun at the same moment, for about so long, at least one. Raises LoadFailed."""
    rounds = max(1, round(seconds / (EVENTS * PACE_S)))
    return uvloop.run(_rounds(target, streams, rounds))


async def _rounds(target: Target, streams: int, rounds: int) -> Paced:
    tally = _Tally()
    async with _without_collector():
        for _ in range(rounds):
            await _round(target.request(stream=True), target.port, streams, tally)
    return Paced(
        streams=streams,
        first_p50_ms=percentile(tally.first_ms, 0.5),
        first_p99_ms=percentile(tally.first_ms, 0.99),
        late_p50_ms=percentile(tally.late_ms, 0.5),
        late_p99_ms=percentile(tally.late_ms, 0.99),
        events=len(tally.late_ms),
        broken=tally.broken,
    )


async def _round(request: bytes, port: int, streams: int, tally: _Tally) -> None:
    loop = asyncio.get_running_loop()
    opening = [loop.create_connection(lambda: _Reader(request, tally), HOST, port) for _ in range(streams)]
    try:
        opened = await asyncio.gather(*opening)
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(reader.over for _, reader in opened))
    except TimeoutError:
        raise LoadFailed(f"{streams} streams did not end within {PATIENCE_S:.0f} s") from None
    except OSError as error:
        raise LoadFailed(f"port {port} cannot be reached: {error}") from error


@asynccontextmanager
async def _without_collector() -> AsyncIterator[None]:
    """Our own garbage collections would look like late events."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
