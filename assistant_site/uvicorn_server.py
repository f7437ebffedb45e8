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

logger = logging.getLogger(__name__)

MAX_HEAD = 64 * 1024  # bytes of request line and headers
MAX_MESSAGE = 1024 * 1024  # bytes of one WebSocket message
BACKLOG = 2048
SWEEP_S = 1.0  # between two looks at deadlines
END_S = 2.0  # for cancelled applications to clean up


class LimitedProtocol(HttpToolsProtocol):
    """Refuses over-long heads, which uvicorn would collect for ever, and answers bad framing with a JSON error."""

    _head_size = 0
    _in_head = False
    _touched = 0.0  # when the connection or its current request began, or a piece of body came

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._touched = self.loop.time()

    def overdue(self, now: float, deadlines: Deadlines) -> bool:
        """Whether the client takes too long over a head or a body; idle connections are uvicorn's to close."""
        if self._in_head or self.cycle is None:
            return now - self._touched > deadlines.head
        receiving = self.cycle.more_body and not self.cycle.response_complete and not self.flow.read_paused
        return receiving and now - self._touched > deadlines.body

    def data_received(self, data: bytes) -> None:
        if not self._in_head:
            self._touched = self.loop.time()
        super().data_received(data)
        if self._in_head:
            self._head_size += len(data)
            self._check_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_size = 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def _check_head(self) -> None:
        if self._head_size > MAX_HEAD and not self.transport.is_closing():
            self._end_with(http_errors.head_too_large(MAX_HEAD))

    def send_400_response(self, msg: str) -> None:
        self._end_with(http_errors.bad_request())

    def _end_with(self, answer: bytes) -> None:
        running = self.cycle is not None and not self.cycle.response_complete
        if running and self.cycle.response_started:
            self.transport.abort()
            return
        if running:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
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
    """One line, no traceback, for an application that says it cannot complete the answer it began."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, ConnectionAbortedError):
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg, record.args, record.exc_info = "An answer was cut off: %s", (error,), None
    return True


def _typed(application: ASGIApplication) -> Any:
    """uvicorn names the three ASGI callables by its own, narrower types."""
    return application
