"""One request and its answer under our Daphne: the `receive` and `send` that one application call gets.

Leaner than Daphne's WebRequest: no queue, no Twisted Request, no temporary file. The body is handed on as it arrives, the
answer's head and first bytes leave in one write, and send() waits while the client does not read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING

from assistant_site import http_errors
from assistant_site.asgi_types import Message, Scope

if TYPE_CHECKING:
    from assistant_site.daphne_http import Channel

logger = logging.getLogger(__name__)

# Bytes of body waiting for the application before we stop reading from the client.
MAX_UNREAD = 256 * 1024
# How long an application may go on after its client has gone before it is cancelled.
APPLICATION_CLOSE_S = 10.0
# Bytes of answer collected within one turn of the event loop before they are written without waiting for its end.
MAX_COLLECTED = 64 * 1024

STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
BODILESS = {HTTPStatus.NO_CONTENT.value, HTTPStatus.NOT_MODIFIED.value}


class Exchange:
    """State of one request. Owned by its channel; `complete` once the answer is whole, `gone` once nobody can read it."""

    __slots__ = (
        "_bodiless",
        "_body",
        "_body_size",
        "_channel",
        "_chunked",
        "_collected",
        "_collected_size",
        "_end_told",
        "_expects_continue",
        "_head",
        "_left",
        "_overdue",
        "_scope",
        "_started",
        "_status",
        "_task",
        "_waiting",
        "body_complete",
        "complete",
        "gone",
        "keep_alive",
        "written",
    )

    def __init__(self, channel: Channel, scope: Scope, *, keep_alive: bool, expects_continue: bool) -> None:
        self._channel = channel
        self._scope = scope
        self._bodiless = scope["method"] == "HEAD"
        self._expects_continue = expects_continue
        self._body: list[bytes] = []
        self._body_size = 0
        self._end_told = False
        self._waiting: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None
        self._overdue: asyncio.TimerHandle | None = None
        self._started = False
        self._status = 0
        self._head: list[bytes] | None = None  # header lines until the framing is known and they are written
        self._chunked = False
        self._left: int | None = None  # bytes of a declared Content-Length still to come; None where nothing is declared
        self._collected: list[bytes] = []
        self._collected_size = 0
        self.keep_alive = keep_alive
        self.body_complete = False
        self.written = False  # some byte of the answer has left
        self.complete = False
        self.gone = False

    def start(self) -> None:
        """Run the application on this request."""
        server = self._channel.server
        self._task = server.loop.create_task(server.application(self._scope, self.receive, self.send))
        server.tasks.add(self._task)
        self._task.add_done_callback(self._ended)

    # The request's side

    def feed(self, data: bytes) -> None:
        """Body bytes came."""
        self._body.append(data)
        self._body_size += len(data)
        if self._body_size > MAX_UNREAD:
            self._channel.pause_reading()
        self._wake()

    def feed_end(self) -> None:
        """The body is whole."""
        self.body_complete = True
        self._wake()

    def lose(self) -> None:
        """The client has gone, or its request broke off: the application learns of it at once and gets some time to end."""
        self.gone = True
        self._wake()
        if self._task is not None and not self._task.done():
            self._overdue = self._channel.server.loop.call_later(APPLICATION_CLOSE_S, self._cancel_overdue)

    def _cancel_overdue(self) -> None:
        if self._task is not None and self._task.cancel():
            logger.warning("The application went on after its client had gone: %s %s", self._scope["method"], self._scope["path"])

    async def receive(self) -> Message:
        """The next http.request, or http.disconnect once the client has gone or the answer is whole."""
        while not self.complete and not self.gone:
            if self._body or (self.body_complete and not self._end_told):
                return self._take_body()
            if self._expects_continue and not self._started:
                self._expects_continue = False
                self._channel.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            waiter = self._channel.server.loop.create_future()
            self._waiting.append(waiter)
            await waiter
        return {"type": "http.disconnect"}

    def _take_body(self) -> Message:
        body = b"".join(self._body)
        self._body.clear()
        if self._body_size > MAX_UNREAD:
            self._channel.resume_reading()
        self._body_size = 0
        self._end_told = self.body_complete
        return {"type": "http.request", "body": body, "more_body": not self.body_complete}

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()

    # The answer's side

    async def send(self, message: Message) -> None:
        """Take one http.response.* message; waits while the client does not read. Dropped once the client has gone."""
        if self.gone:
            return
        kind = message["type"]
        if kind == "http.response.body":
            self._take_answer(message.get("body", b""), message.get("more_body", False))
            if self._channel.paused:
                await self._channel.writable()
        elif kind == "http.response.start":
            self._take_start(message["status"], message.get("headers", ()))
        else:
            raise ValueError(f"An HTTP application cannot send {kind!r}.")

    def _take_start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        if self._started:
            raise RuntimeError("http.response.start was sent twice.")
        self._status = status
        self._head = self._header_lines(headers)
        self._started = True
        # An answer whose first bytes take long shows its head at once; usually the body is there first.
        self._channel.server.loop.call_soon(self._flush)

    def _header_lines(self, headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
        """The application's header lines without those of framing and connection, which are ours to write."""
        lines = []
        for name, value in headers:
            lower = name.lower()
            if lower == b"content-length":
                self._left = int(value)
            elif lower == b"connection":
                if b"close" in value.lower():
                    self.keep_alive = False
                continue
            elif lower == b"transfer-encoding":
                continue
            line = b"%b: %b\r\n" % (name, value)
            if line.count(b"\n") != 1 or line.count(b"\r") != 1:
                raise ValueError(f"The answer's header {name!r} holds a line break.")
            lines.append(line)
        return lines

    def _take_answer(self, data: bytes, more: bool) -> None:
        if not self._started:
            raise RuntimeError("http.response.body was sent before http.response.start.")
        if self.complete:
            raise RuntimeError("http.response.body was sent after the end of the answer.")
        if self._head is not None:
            self._render_head(self._head, None if more else len(data))
        if data and not self._bodiless:
            self._collect(data)
        if more:
            if self._collected_size > MAX_COLLECTED:
                self._flush()
            return
        if self._chunked:
            self._collected.append(b"0\r\n\r\n")
        elif self._left and not self._bodiless:
            raise RuntimeError("The answer is shorter than its Content-Length.")
        self._finish()

    def _collect(self, data: bytes) -> None:
        if self._chunked:
            self._collected += (b"%x\r\n" % len(data), data, b"\r\n")
        else:
            if self._left is not None:
                self._left -= len(data)
                if self._left < 0:
                    raise RuntimeError("The answer is longer than its Content-Length.")
            self._collected.append(data)
        if self._collected_size == 0 and self.written:
            self._channel.server.loop.call_soon(self._flush)
        self._collected_size += len(data)

    def _render_head(self, lines: list[bytes], whole_length: int | None) -> None:
        """Put the head before the body; whole_length is the body's length where it is known already."""
        self._head = None
        if self._status in BODILESS:
            self._bodiless = True
        elif self._left is None and not self._bodiless:
            if whole_length is not None:
                self._left = whole_length
                lines.append(b"content-length: %d\r\n" % whole_length)
            elif self._scope["http_version"] == "1.1":
                self._chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
            else:  # the end of the connection is the end of the body
                self.keep_alive = False
        if not self.body_complete or self._channel.retiring:
            self.keep_alive = False
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        status_line = STATUS_LINES.get(self._status) or b"HTTP/1.1 %d \r\n" % self._status
        self._collected.append(status_line + b"".join(lines))

    def _flush(self) -> None:
        """Write what is collected; a head whose body has not come yet goes alone."""
        if self.gone:
            return
        if self._head is not None:
            self._render_head(self._head, None)
        if self._collected:
            data = b"".join(self._collected)
            self._collected.clear()
            self._collected_size = 0
            self.written = True
            self._channel.write(data)

    def _finish(self) -> None:
        self._flush()
        self.complete = True
        self._wake()
        self._channel.answered(self)

    # The application's end

    def _ended(self, task: asyncio.Task[None]) -> None:
        """The application returned, failed or was cancelled; an answer it owes is given or cut off visibly."""
        self._channel.server.task_ended(task)
        if self._overdue is not None:  # it would keep all of this exchange alive
            self._overdue.cancel()
            self._overdue = None
        error = None if task.cancelled() else task.exception()
        if isinstance(error, ConnectionAbortedError):  # how an application says that it cannot complete what it began
            logger.warning("%s %s was cut off: %s", self._scope["method"], self._scope["path"], error)
        elif error is not None:
            logger.error("The application failed on %s %s", self._scope["method"], self._scope["path"], exc_info=error)
        if self.complete or self.gone:
            return
        if error is None and not task.cancelled():
            logger.error("The application left %s %s unanswered", self._scope["method"], self._scope["path"])
        self.gone = True
        if self.written:
            # Whoever counts chunks or bytes sees the missing rest; otherwise only a reset tells half an answer from a whole.
            self._channel.cut_off(abruptly=not self._chunked and self._left is None)
        else:
            answer = http_errors.stopping if task.cancelled() else http_errors.application_failed
            self._channel.close_with(answer(self._scope["method"] == "HEAD"))
