"""What the bare upstream client costs beside aiohttp: requests/s and streams/s on one core, both under uvloop.

usage: python -m tests.bench.bench_upstream URL [SECONDS] [CONNECTIONS]
URL is an OpenAI-shaped upstream that is faster than the clients, for example a stand-in that answers streams with 100 chunks at
once. Figures are per second of this process's own CPU time, so that an upstream on the same core does not blur them; the rate by
the clock is given beside. For aiohttp the chunks of a stream are read with iter_any, as a relay would.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

import aiohttp
import uvloop

from gateway_app.sse import StreamScanner
from gateway_app.upstream.http import Origin, UpstreamPool

HEADERS = [(b"content-type", b"application/json"), (b"accept-encoding", b"identity"), (b"user-agent", b"bench")]
PLAIN = b'{"model":"m","messages":[{"role":"user","content":"hello"}]}'
STREAM = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"hello"}]}'

Call = Callable[[bytes], Awaitable[int]]  # a request body -> bytes of the answer


def ours(pool: UpstreamPool, origin: Origin, path: bytes, scan: bool) -> Call:
    """One exchange with our client, through the scanner if asked."""

    async def call(body: bytes) -> int:
        response = await pool.send(origin, b"POST", path, HEADERS, body)
        if body is PLAIN:
            return len(await response.read(2**20))
        scanner = StreamScanner("other", keep_usage=False) if scan else None
        size = 0
        async for data in response.chunks():
            size += len(scanner.feed(data) if scanner else data)
        return size

    return call


def theirs(session: aiohttp.ClientSession, url: str) -> Call:
    """One exchange with aiohttp."""
    headers = {name.decode(): value.decode() for name, value in HEADERS}

    async def call(body: bytes) -> int:
        async with session.post(url, data=body, headers=headers) as response:
            if body is PLAIN:
                return len(await response.read())
            return sum([len(data) async for data in response.content.iter_any()])

    return call


async def rate(name: str, call: Call, body: bytes, seconds: float, connections: int) -> None:
    """Print how often the call runs in this time, so many at once."""
    done = 0
    end = time.monotonic() + seconds

    async def worker() -> None:
        nonlocal done
        while time.monotonic() < end:
            assert await call(body) > 0
            done += 1

    await call(body)
    began, cpu = time.monotonic(), time.process_time()
    await asyncio.gather(*(worker() for _ in range(connections)))
    took, cpu = time.monotonic() - began, time.process_time() - cpu
    print(f"{name:34} {done / cpu:9.0f} /s CPU {done / took:9.0f} /s clock {cpu / done * 1e6:8.1f} µs each")


async def main(url: str, seconds: float, connections: int) -> None:
    """Both clients, both kinds of request."""
    origin, base = Origin.from_url(url)
    path = "/v1/chat/completions"
    pool = UpstreamPool()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()) as session:
        target = (base + path).encode()
        own, other = ours(pool, origin, target, scan=False), theirs(session, url + path)
        await rate("requests, ours", own, PLAIN, seconds, connections)
        await rate("requests, aiohttp", other, PLAIN, seconds, connections)
        await rate("streams, ours", own, STREAM, seconds, connections)
        await rate("streams, ours with the scanner", ours(pool, origin, target, scan=True), STREAM, seconds, connections)
        await rate("streams, aiohttp", other, STREAM, seconds, connections)
    await pool.close()


if __name__ == "__main__":
    _, address, *rest = sys.argv
    uvloop.run(main(address, float(rest[0]) if rest else 3.0, int(rest[1]) if len(rest) > 1 else 32))
