"""uvicorn with the limits, the errors and the end that our Daphne has."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from assistant_site import http_errors
from assistant_site.asgi_types import ASGIApplication
from assistant_site.deadlines import Deadlines
from assistant_site.hang_up import hung_up
from assistant_site.request_parser import RequestParser, head_without_upgrade

logger = logging.getLogger(__name__)

MAX_HEAD = 64 * 1024  # bytes of request line and headers; also of any stretch of a body in which nothing of the body comes
MAX_MESSAGE = 1024 * 1024  # bytes of one WebSocket message
BACKLOG = 2048
SWEEP_S = 1.0  # between two looks at deadlines and for clients that have gone
END_S = 2.0  # for cancelled applications to clean up
_OUT_OF_TIME = "Cancel %s running task(s), timeout graceful shutdown exceeded"  # uvicorn's error at the end of any drain


class LimitedProtocol(HttpToolsProtocol):
    """Refuses over-long heads, which uvicorn would collect for ever, and answers bad framing with a JSON error.

    Tells the running request that its client has gone, where uvicorn tells the last one that was pipelined behind it.
    """

    _head_size = 0
    _in_head = False
    _quiet = 0  # bytes since something of a body came: chunk extensions and trailers
    _declined = False  # the request just read offers an upgrade that we do not take
    _skipped = False  # nothing of the request just read reaches the application
    _running: Any = None  # the cycle of the request that is being answered
    _touched = 0.0  # when the connection or its current request began, or a piece of body came

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = RequestParser(self)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._touched = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def overdue(self, now: float, deadlines: Deadlines) -> bool:
        """Whether the client takes too long over a head or a body, or has gone without an event that told.

        Idle connections are uvicorn's to close.
        """
        if self._in_head or self.cycle is None:
            return now - self._touched > deadlines.head
        if self.flow.read_paused and not self.transport.is_closing():
            return hung_up(self.transport.get_extra_info("socket").fileno())
        receiving = self.cycle.more_body and not self.cycle.response_complete
        return receiving and now - self._touched > deadlines.body

    def data_received(self, data: bytes) -> None:
        if not self._in_head:
            self._touched = self.loop.time()
        self._quiet += len(data)
        super().data_received(data)
        if self._in_head:
            self._head_size += len(data)
            self._check_head(self._head_size)
        elif self.cycle is not None and self.cycle.more_body:
            self._check_head(self._quiet)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_size = self._quiet = 0
        self._known_size = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else a trailer, for which ASGI has no place
            self._known_size += len(name) + len(value)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._quiet = 0
        self._check_head(self._known_size)
        self._skipped = self.transport.is_closing() or self._declines()
        if not self._skipped:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._quiet = 0
        if not self._skipped:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._skipped:
            super().on_message_complete()

    def declined_upgrade(self) -> bytes | None:
        declined, self._declined = self._declined, False
        return head_without_upgrade(self.parser, self.url, self.headers) if declined else None

    def _declines(self) -> bool:
        self._declined = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT" and not self._should_upgrade()
        return self._declined

    def _should_upgrade(self) -> bool:
        return self.parser.get_method() == b"GET" and super()._should_upgrade()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _check_head(self, size: int) -> None:
        if size > MAX_HEAD and not self.transport.is_closing():
            self._end_with(http_errors.head_too_large(MAX_HEAD))

    def send_400_response(self, msg: str) -> None:
        self._end_with(http_errors.bad_request())

    def _end_with(self, answer: bytes) -> None:
        running = self._running
        if running is not None and not running.response_complete:
            if running.response_started:
                self.transport.abort()
                return
            running.disconnected = True
            running.message_event.set()
        self.transport.write(answer)
        self.transport.close()


class UvicornServer:
    """Serves one application on one listening socket."""

    def __init__(self, application: ASGIApplication, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        logging.getLogger("uvicorn.error").addFilter(_shorten)
        config = uvicorn.Config(
            _typed(application),
            http=LimitedProtocol,
            ws="websockets-sansio",
            ws_max_size=MAX_MESSAGE,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=round(deadlines.keep_alive),
        )
        self._server = uvicorn.Server(config)

    async def start(self, listener: socket.socket) -> None:
        """Listen on this bound socket. Signals are the runner's: uvicorn's own serve() would take them."""
        config = self._server.config
        config.load()
        self._server.lifespan = config.lifespan_class(config)
        await self._server.startup(sockets=[listener])
        self._listener = listener
        self._main = asyncio.create_task(self._server.main_loop())
        self._sweeper = asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            for connection in list(self._server.server_state.connections):
                if isinstance(connection, LimitedProtocol) and connection.overdue(loop.time(), self._deadlines):
                    connection.transport.abort()

    async def drain(self, seconds: float, cut: asyncio.Event) -> None:
        """Take no more connections, let running requests end for some seconds or until `cut` is set, then end the rest."""
        server = self._server
        server.should_exit = True
        await self._main
        server.config.timeout_graceful_shutdown = seconds  # type: ignore[assignment]  # any number will do
        forced = asyncio.create_task(self._force(cut))
        try:
            await server.shutdown(sockets=[self._listener])
        finally:
            forced.cancel()
        running = list(server.server_state.tasks)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=END_S)
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        self._sweeper.cancel()
        await asyncio.wait({self._sweeper})

    async def _force(self, cut: asyncio.Event) -> None:
        await cut.wait()
        self._server.force_exit = True


def _shorten(record: logging.LogRecord) -> bool:
    """One line, no traceback and no error, for an answer that was cut off by the application's word or by the process's end."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, ConnectionAbortedError | asyncio.CancelledError):
        _as_warning(record, f"An answer was cut off: {str(error) or 'the process stops'}")
    elif record.msg == _OUT_OF_TIME:
        tasks = record.args[0] if isinstance(record.args, tuple) else 0
        _as_warning(record, f"The time to drain is over; {tasks} requests and the open connections are cut off.")
    return True


def _as_warning(record: logging.LogRecord, text: str) -> None:
    record.levelno, record.levelname = logging.WARNING, "WARNING"
    record.msg, record.args, record.exc_info = "%s", (text,), None


def _typed(application: ASGIApplication) -> Any:
    """uvicorn names the three ASGI callables by its own, narrower types."""
    return application
