"""A real HTTP server that stands in for the gateway: it answers when and as a test says, and notices who hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class Received:
    """One request as it came. Header names are lower-case; repeated ones are joined."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Exchange:
    """One request being answered by a test's script."""

    request: Received
    _writer: asyncio.StreamWriter

    async def head(self, status: int = 200, **headers: str) -> None:
        """Start an answer of no announced length."""
        lines = [f"HTTP/1.1 {status} Whatever", "transfer-encoding: chunked"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self._send("\r\n".join([*lines, "", ""]).encode())

    async def chunk(self, data: bytes) -> None:
        """Send some of the body."""
        await self._send(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def end(self) -> None:
        """Finish the body."""
        await self._send(b"0\r\n\r\n")

    async def answer(self, status: int, body: bytes, **headers: str) -> None:
        """A whole answer."""
        await self.head(status, **headers)
        if body:
            await self.chunk(body)
        await self.end()

    def break_off(self) -> None:
        """Drop the connection."""
        self._writer.transport.abort()

    async def _send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()


Script = Callable[[Exchange], Awaitable[None]]


async def _default(exchange: Exchange) -> None:
    await exchange.answer(200, b'{"ok": true}', content_type="application/json")


@dataclass
class GatedGateway:
    """`gone` is set when a client has closed its connection."""

    script: Script = _default
    received: list[Received] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                exchange = Exchange(await _read_request(reader), writer)
                self.received.append(exchange.request)
                self.arrived.set()
                await self._run(exchange, reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone.set()
        finally:
            writer.close()

    async def _run(self, exchange: Exchange, reader: asyncio.StreamReader) -> None:
        """Run the script, and end it when the client hangs up."""
        script = asyncio.ensure_future(self.script(exchange))
        watch = asyncio.create_task(_hung_up(reader))
        try:
            await asyncio.wait({script, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not script.done():
                raise ConnectionError("the client has gone")
            await script
        finally:
            for task in (script, watch):
                task.cancel()
            await asyncio.gather(script, watch, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connection(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _hung_up(reader: asyncio.StreamReader) -> None:
    """Return once the client has closed; no request is pipelined here, so anything else never comes."""
    while not reader.at_eof():
        await asyncio.sleep(0.005)


async def _read_request(reader: asyncio.StreamReader) -> Received:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    start, *lines = head.strip().split("\r\n")
    method, target, _ = start.split(" ")
    headers: dict[str, str] = {}
    for line in lines:
        name, value = line.split(":", 1)
        headers[name.lower()] = f"{headers[name.lower()]}, {value.strip()}" if name.lower() in headers else value.strip()
    return Received(method, target, headers, await reader.readexactly(int(headers.get("content-length", "0"))))


@asynccontextmanager
async def gated_gateway() -> AsyncIterator[GatedGateway]:
    """Serve on a loopback port of the kernel's choice."""
    gateway = GatedGateway()
    server = await asyncio.start_server(gateway._accept, "127.0.0.1", 0)
    gateway.port = server.sockets[0].getsockname()[1]
    try:
        yield gateway
    finally:
        server.close()
        for task in list(gateway._tasks):
            task.cancel()
        await asyncio.gather(*gateway._tasks, return_exceptions=True)
