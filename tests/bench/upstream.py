"""A stand-in for an engine that answers OpenAI calls at once, so that what is measured is the gateway.

usage: python -m tests.bench.upstream PORT
POST …/chat/completions gets a fixed answer; a streamed call gets `max_tokens` events (100 where it names none) in the layout of
llama.cpp's server: all at once, or PACE_S apart where the path begins with /paced. Each event's text is the monotonic clock in
nanoseconds at which it was written, so a reader on the same machine knows how late it came. Any GET answers like /v1/models.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from functools import lru_cache
from typing import Any, Final, cast

import uvloop

HOST: Final = "127.0.0.1"
EVENTS: Final = 100
PACE_S: Final = 0.02
PACED: Final = "/paced"
STAMP_DIGITS: Final = 19
BACKLOG: Final = 4096

_USAGE: Final = b'"usage":{"completion_tokens":20,"prompt_tokens":10,"total_tokens":30}'
_STREAM_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_LENGTH: Final = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_CONTENT: Final = b'[{"finish_reason":null,"index":0,"delta":{"content":"%b"}}]'


def whole(body: bytes) -> bytes:
    """An HTTP answer with this JSON body."""
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def event(model: bytes, choices: bytes, more: bytes = b"") -> bytes:
    """One event as one HTTP chunk."""
    data = (
        b'data: {"choices":%b,"created":1700000000,"id":"chatcmpl-stand-in","model":%b,"system_fingerprint":"stand-in",'
        b'"object":"chat.completion.chunk"%b}\n\n'
    ) % (choices, model, more)
    return b"%x\r\n%b\r\n" % (len(data), data)


@lru_cache
def answer(model: bytes) -> bytes:
    """A whole, plain answer."""
    return whole(
        b'{"choices":[{"finish_reason":"stop","index":0,"message":{"role":"assistant","content":"%b"}}],"created":1700000000,'
        b'"model":%b,"object":"chat.completion","id":"chatcmpl-stand-in",%b}' % (b"word " * 20, model, _USAGE)
    )


@lru_cache
def opening(model: bytes) -> bytes:
    """The head of a stream and the event that names the role."""
    return _STREAM_HEAD + event(model, b'[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}]')


@lru_cache
def around_stamp(model: bytes) -> tuple[bytes, bytes]:
    """What stands before and after the stamp in a content event."""
    before, _, after = event(model, _CONTENT % (b"0" * STAMP_DIGITS)).partition(b"0" * STAMP_DIGITS)
    return before, after


@lru_cache
def closing(model: bytes, usage: bool) -> bytes:
    """All that follows the last content event."""
    finish = event(model, b'[{"finish_reason":"stop","index":0,"delta":{}}]')
    spent = event(model, b"[]", b"," + _USAGE) if usage else b""
    return finish + spent + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def stamped(model: bytes) -> bytes:
    """One content event that carries the time."""
    before, after = around_stamp(model)
    return b"%b%0*d%b" % (before, STAMP_DIGITS, time.monotonic_ns(), after)


class PacedStream:
    """Writes events at fixed times from its beginning on, however late the one before was."""

    def __init__(self, transport: asyncio.Transport, model: bytes, events: int, usage: bool) -> None:
        self._transport = transport
        self._model = model
        self._events = events
        self._usage = usage
        self._written = 0
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()
        transport.write(opening(model))
        self._next()

    def _next(self) -> None:
        self._timer = self._loop.call_at(self._begun + (self._written + 1) * PACE_S, self._write)

    def _write(self) -> None:
        self._transport.write(stamped(self._model))
        self._written += 1
        if self._written < self._events:
            self._next()
        else:
            self._transport.write(closing(self._model, self._usage))

    def stop(self) -> None:
        """The reader has gone."""
        self._timer.cancel()


class Connection(asyncio.Protocol):
    """One request after another; bodies have a Content-Length."""

    def __init__(self) -> None:
        self._held = b""
        self._stream: PacedStream | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._stream is not None:
            self._stream.stop()

    def data_received(self, data: bytes) -> None:
        self._held += data
        while (end := self._held.find(b"\r\n\r\n")) >= 0:
            head = self._held[:end]
            length = _LENGTH.search(head)
            stop = end + 4 + (int(length[1]) if length else 0)
            if len(self._held) < stop:
                return
            body, self._held = self._held[end + 4 : stop], self._held[stop:]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"GET "):
            self._transport.write(whole(b'{"object":"list","data":[{"id":"m","object":"model","created":1,"owned_by":"bench"}]}'))
            return
        call: dict[str, Any] = json.loads(body)
        model = json.dumps(call["model"]).encode()
        if not call.get("stream"):
            self._transport.write(answer(model))
            return
        usage = bool((call.get("stream_options") or {}).get("include_usage"))
        events = call.get("max_tokens") or EVENTS
        if head.startswith(b"POST %b/" % PACED.encode()):
            self._stream = PacedStream(self._transport, model, events, usage)
        else:
            self._transport.write(opening(model))
            for _ in range(events):  # each made and written by itself, as an engine does
                self._transport.write(stamped(model))
            self._transport.write(closing(model, usage))


async def serve(port: int) -> None:
    """Until cancelled."""
    server = await asyncio.get_running_loop().create_server(Connection, HOST, port, backlog=BACKLOG)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
