"""Daphne's server, made fast and correct: what it changes and why stands at each method.

Import only after an asyncio reactor is installed on the loop to run on, as runner.py does: importing daphne.server installs one
on a loop of its own otherwise.
Tested on the pinned versions of Daphne, Twisted and autobahn.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from functools import partial
from typing import Any

from daphne.http_protocol import HTTPFactory
from daphne.server import Server
from twisted.internet import reactor
from twisted.logger import FilteringLogObserver, LogLevel, LogLevelFilterPredicate, STDLibLogObserver, globalLogBeginner

from assistant_site.asgi_types import ASGIApplication, Message, Scope
from assistant_site.daphne_exchange import APPLICATION_CLOSE_S
from assistant_site.daphne_http import Channel
from assistant_site.daphne_websocket import MAX_MESSAGE, Sockets, WebSocket
from assistant_site.deadlines import Deadlines

logger = logging.getLogger(__name__)

BACKLOG = 2048  # connections the kernel holds for us
SWEEP_S = 1.0  # between two looks at deadlines and for clients that have gone
END_S = 2.0  # for cancelled applications to clean up and for connections to close


class Factory(HTTPFactory):  # type: ignore[misc]  # Daphne is untyped
    """Daphne's factory with our channel; writes no line per request and keeps no clock for one."""

    def buildProtocol(self, addr: Any) -> Channel:
        return Channel(self.server)

    def log(self, request: Any) -> None:
        """Nothing: Twisted formats a line per request even where nobody listens."""

    def startFactory(self) -> None:
        """Nothing: no log file, no date timer."""

    def stopFactory(self) -> None:
        """Nothing was started."""


class DaphneServer(Server):  # type: ignore[misc]  # Daphne is untyped
    """Serves one application on one listening socket.

    `forwarded` believes X-Forwarded-*: only for a socket that nobody but our own gateway reaches.
    """

    def __init__(self, application: ASGIApplication, *, forwarded: bool, deadlines: Deadlines) -> None:
        super().__init__(
            application,
            endpoints=["adopted"],  # never read: start() takes a bound socket
            signal_handlers=False,
            websocket_timeout=-1,  # a WebSocket may stay open
            proxy_forwarded_address_header="X-Forwarded-For" if forwarded else None,
            proxy_forwarded_port_header="X-Forwarded-Port" if forwarded else None,
            proxy_forwarded_proto_header="X-Forwarded-Proto" if forwarded else None,
        )
        self.forwarded = forwarded
        self.deadlines = deadlines
        self.channels: set[Channel] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        # Protocol -> {"connected", "disconnected", "application_instance"}, as in stock; WebSockets only.
        self.connections: dict[WebSocket, dict[str, Any]] = {}
        self._changed = asyncio.Event()

    async def start(self, listener: socket.socket) -> None:
        """Listen on this bound socket."""
        self.loop = asyncio.get_running_loop()
        self.clock = self.loop.time()  # seconds, as of the last sweep: close enough for deadlines, free to read
        observer = FilteringLogObserver(STDLibLogObserver("twisted"), [LogLevelFilterPredicate(LogLevel.error)])
        globalLogBeginner.beginLoggingTo([observer], redirectStandardIO=False, discardBuffer=True)
        self.ws_factory = Sockets(self, server="")
        self.ws_factory.setProtocolOptions(
            autoPingTimeout=self.ping_timeout,
            allowNullOrigin=True,
            openHandshakeTimeout=self.websocket_handshake_timeout,
            maxMessagePayloadSize=MAX_MESSAGE,
            maxFramePayloadSize=MAX_MESSAGE,
        )
        listener.setblocking(False)
        self._port = reactor.adoptStreamPort(listener.fileno(), listener.family, Factory(self))
        listener.listen(BACKLOG)  # Twisted serves a duplicate and asked for 50
        listener.close()  # ours would keep the door open after Twisted closes its own
        self._sweeper = self.loop.call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """In place of a timer per request."""
        self.clock = now = self.loop.time()
        for channel in list(self.channels):
            if channel.deadline < now or channel.stall_deadline < now:
                channel.expire()
            else:
                channel.look_for_hang_up()
        for protocol in list(self.connections):
            protocol.check_timeouts()
        self._sweeper = self.loop.call_later(SWEEP_S, self._sweep)

    # What channels report

    def channel_lost(self, channel: Channel) -> None:
        self.channels.discard(channel)
        self._changed.set()

    def task_ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self._changed.set()

    # WebSockets

    def adopt_websocket(self, transport: Any, query_string: bytes, request: bytes) -> None:
        """Let Daphne's WebSocket protocol take this connection over, beginning with this handshake request."""
        protocol = self.ws_factory.buildProtocol(transport.getPeer())
        protocol._raw_query_string = query_string
        transport.protocol = protocol
        protocol.makeConnection(transport)
        protocol.dataReceived(request)

    def create_application(self, protocol: WebSocket, scope: Scope) -> asyncio.Queue[Message]:
        """As stock, but the application is reaped when it is done, not when a sweep meets it."""
        scope["asgi"] = {"version": "3.0", "spec_version": "2.3"}
        queue: asyncio.Queue[Message] = asyncio.Queue()
        task = self.loop.create_task(self.application(scope, protocol.receive, partial(self.handle_reply, protocol)))
        self.connections[protocol]["application_instance"] = task
        self.tasks.add(task)
        task.add_done_callback(partial(self._websocket_ended, protocol))
        return queue

    async def handle_reply(self, protocol: WebSocket, message: Message) -> None:
        """As stock, but waits while the client does not read."""
        details = self.connections.get(protocol)
        if details is None or "disconnected" in details:
            return
        protocol.handle_reply(message)
        await protocol.writable()

    def protocol_disconnected(self, protocol: WebSocket) -> None:
        """May come twice, and after the application ended; stock fails on the latter."""
        details = self.connections.get(protocol)
        if details is None or "disconnected" in details:
            return
        details["disconnected"] = self.loop.time()
        task = details.get("application_instance")
        if task is None or task.done():
            self._forget(protocol)
        else:
            self.loop.call_later(APPLICATION_CLOSE_S, task.cancel)

    def _websocket_ended(self, protocol: WebSocket, task: asyncio.Task[None]) -> None:
        self.task_ended(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.error("The application failed on WebSocket %s", protocol.path.decode(), exc_info=error)
        if "disconnected" in self.connections[protocol]:
            self._forget(protocol)
        elif error is not None:
            protocol.handle_exception(error)
        else:  # nobody will ever answer on it
            protocol.refuse()
            protocol.end(1000)

    def _forget(self, protocol: WebSocket) -> None:
        del self.connections[protocol]
        self._changed.set()

    # The end

    async def drain(self, seconds: float, cut: asyncio.Event) -> None:
        """Take no more connections, let running requests end for some seconds or until `cut` is set, then end the rest."""
        with contextlib.suppress(FileNotFoundError):  # a socket file that somebody removed
            await self._port.stopListening().asFuture(self.loop)
        for channel in list(self.channels):
            channel.retire()
        for protocol in list(self.connections):
            protocol.retire()
        if not cut.is_set():
            await self._settle(seconds, cut)
        for task in list(self.tasks):
            task.cancel()
        await self._settle(END_S, asyncio.Event())
        for channel in list(self.channels):
            channel.abort()
        for protocol in list(self.connections):
            protocol.transport.abortConnection()
        await asyncio.sleep(0)  # Twisted reports the aborted connections in the next turn
        self._sweeper.cancel()

    async def _settle(self, seconds: float, cut: asyncio.Event) -> None:
        """Wait until nothing runs and nobody is connected, for some seconds at most, or until `cut` is set."""
        waits = {asyncio.ensure_future(self._settled()), asyncio.ensure_future(cut.wait())}
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _settled(self) -> None:
        while self.channels or self.tasks or self.connections:
            self._changed.clear()
            await self._changed.wait()
