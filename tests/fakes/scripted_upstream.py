"""An emulated engine: a small HTTP/1.1 server on loopback whose bytes come from a script.

No model runs here and no HTTP library answers, so a test can send exactly the bytes it means, well-formed or not, split
where it likes, and see what the gateway does. Usage:

    async def script(peer: Peer) -> None:
        request = await peer.read_request()
        peer.write(response(b'{"ok": true}'))

    async with ScriptedUpstream(script) as upstream:
        ...  # upstream.host, upstream.port, upstream.url, upstream.requests, upstream.connections

The script runs once for each request: it starts when the first byte of a request is there, and when it returns the
connection stays open for the next request. A script that reads no request, calls close() or abort(), or fails ends its
connection. Leaving the `async with` ends every connection and cancels scripts that still run; an exception that a script
raised is raised again there, so that a wrong script fails its test.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

EVENT_STREAM = "text/event-stream"


@dataclass(frozen=True, slots=True)
class SeenRequest:
    """One request as it arrived. headers: names in lower case, in order."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    connection: int  # which connection brought it, counted from 0

    def header(self, name: str) -> str | None:
        """The first header of that name, None without."""
        return next((value for key, value in self.headers if key == name), None)

    def json(self) -> Any:
        """The body parsed."""
        return json.loads(self.body)


class Peer:
    """One connection, as the script handles it."""

    def __init__(self, server: ScriptedUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer
        self.number = number
        self.ended = False
        self.reads = 0
        self._first = b""

    async def waiting(self) -> bool:
        """Until a request begins; False when the client has closed instead."""
        try:
            self._first = await self._reader.read(1)
        except ConnectionError:
            return False
        return bool(self._first)

    async def read_request(self) -> SeenRequest:
        """The next request whole. Raises asyncio.IncompleteReadError or ConnectionError if the client goes away first."""
        head = self._first + await self._reader.readuntil(b"\r\n\r\n")
        self._first = b""
        start, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        method, target, _ = start.split(" ")
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        length = int(dict(headers).get("content-length", "0"))
        request = SeenRequest(method, target, headers, await self._reader.readexactly(length), self.number)
        self.reads += 1
        self._server.requests.append(request)
        self._server.notify()
        return request

    def write(self, data: bytes) -> None:
        """Send these bytes as they are, now."""
        self._writer.write(data)

    async def drain(self) -> None:
        """Until the client has taken most of what was written. Raises ConnectionError when it has gone."""
        await self._writer.drain()

    @property
    def unsent(self) -> int:
        """Bytes written that the kernel has not taken: grows when the client stops reading."""
        return self._writer.transport.get_write_buffer_size()

    async def wait_closed(self) -> None:
        """Until the client has closed or reset the connection; anything it still sends is dropped."""
        with contextlib.suppress(ConnectionError):
            while await self._reader.read(65536):
                pass

    def close(self) -> None:
        """Close after everything written is sent."""
        self.ended = True
        self._writer.close()

    def abort(self) -> None:
        """Close at once, without sending what is left."""
        self.ended = True
        self._writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


@dataclass
class ScriptedUpstream:
    """The server; see the module's docstring. tls: serve with this context. on_connect: runs before any request is awaited."""

    script: Script
    on_connect: Script | None = None
    tls: ssl.SSLContext | None = None
    port: int = 0
    host: str = "127.0.0.1"
    requests: list[SeenRequest] = field(default_factory=list)
    connections: int = 0
    open_connections: int = 0
    failures: list[Exception] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"

    async def __aenter__(self) -> ScriptedUpstream:
        self._server = await asyncio.start_server(self._accept, self.host, self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.failures and error is None:
            raise self.failures[0]

    def stop_listening(self) -> None:
        """Refuse new connections from now on; those that stand go on."""
        self._server.close()

    def notify(self) -> None:
        """Something a test may wait for has changed."""
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; it is tried whenever a request came or a connection opened or ended."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(self, reader, writer, self.connections)
        self.connections += 1
        self.open_connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.notify()
        try:
            await self._converse(peer)
            writer.close()
            await _closed(writer)
        except asyncio.CancelledError:
            peer.abort()
            await _closed(writer)
        finally:
            self.open_connections -= 1
            self.notify()

    async def _converse(self, peer: Peer) -> None:
        try:
            if self.on_connect is not None:
                await self.on_connect(peer)
            while not peer.ended and await peer.waiting():
                reads = peer.reads
                await self.script(peer)
                if peer.reads == reads:
                    peer.close()
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # the client went away, which is its right
        except Exception as error:  # noqa: BLE001 - kept for the test, which must not pass with a broken script
            self.failures.append(error)


async def _closed(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        await writer.wait_closed()


# --- bytes for scripts -------------------------------------------------------------------------------------------------


def head(status: int = 200, headers: Iterable[tuple[str, str]] = ()) -> bytes:
    """Status line and headers, with the blank line."""
    lines = [f"HTTP/1.1 {status} Scripted", *(f"{name}: {value}" for name, value in headers)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def response(
    body: bytes, status: int = 200, headers: Iterable[tuple[str, str]] = (("Content-Type", "application/json"),)
) -> bytes:
    """A whole answer with Content-Length."""
    return head(status, [*headers, ("Content-Length", str(len(body)))]) + body


def stream_head(status: int = 200, content_type: str = EVENT_STREAM) -> bytes:
    """The head of a chunked event stream."""
    return head(status, [("Content-Type", content_type), ("Transfer-Encoding", "chunked")])


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body; chunk(b"") ends it."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(payload: object) -> bytes:
    """One server-sent event: an object as compact JSON, bytes as they are."""
    data = payload if isinstance(payload, bytes) else json.dumps(payload, separators=(",", ":")).encode()
    return b"data: " + data + b"\n\n"


def completion_events(
    words: Iterable[str], model: str = "engine-model", *, role: bool = True, usage: dict[str, int] | None = None
) -> list[bytes]:
    """What an engine streams for a chat: an event per word, the finish, the usage chunk if given, [DONE]."""
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": model}

    def choice(delta: dict[str, str], finish: str | None = None) -> bytes:
        return event({**base, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    events = [choice({"role": "assistant", "content": ""})] if role else []
    events += [choice({"content": word}) for word in words]
    events.append(choice({}, "stop"))
    if usage is not None:
        events.append(event({**base, "choices": [], "usage": usage}))
    return [*events, event(b"[DONE]")]
