"""Daphne's WebSocket protocol with every close code, empty frames, back-pressure both ways and 1012 when the process stops."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from daphne.ws_protocol import WebSocketFactory, WebSocketProtocol

from assistant_site.asgi_types import Message

if TYPE_CHECKING:
    from assistant_site.daphne_server import DaphneServer

MAX_MESSAGE = 1024 * 1024  # bytes of one message
MAX_WAITING = 32  # messages waiting for the application before we stop reading from the client
MAX_REASON = 123  # bytes of a close reason
SERVICE_RESTART = 1012


class WebSocket(WebSocketProtocol):  # type: ignore[misc]  # Daphne is untyped
    """One WebSocket. The application's messages come through handle_reply(), the client's go to `application_queue`."""

    server: DaphneServer
    transport: Any
    application_queue: asyncio.Queue[Message]

    def connectionMade(self) -> None:
        self._paused = False
        self._reading = True
        self._writers: list[asyncio.Future[None]] = []
        self.transport.registerProducer(self, True)
        super().connectionMade()

    # From the client

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        super().onMessage(payload, isBinary)
        if self.application_queue.qsize() > MAX_WAITING and self._reading:
            self._reading = False
            self.transport.pauseProducing()

    async def receive(self) -> Message:
        """The application's next message."""
        message = await self.application_queue.get()
        if not self._reading and self.application_queue.qsize() <= MAX_WAITING // 2:
            self._reading = True
            self.transport.resumeProducing()
        return message

    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        self._release_writers()
        # A handshake that failed before onConnect() never had an application.
        if hasattr(self, "application_queue"):
            super().onClose(wasClean, code, reason)

    # From the application

    def handle_reply(self, message: Message) -> None:
        kind = message["type"]
        if kind == "websocket.send":
            self._send(message.get("bytes"), message.get("text"))
        elif kind == "websocket.close" and self.state == self.STATE_OPEN:
            self.end(message.get("code") or 1000, message.get("reason") or "")
        else:
            super().handle_reply(message)

    def _send(self, data: bytes | None, text: str | None) -> None:
        if self.state == self.STATE_CONNECTING:
            raise RuntimeError("websocket.send came before websocket.accept.")
        if data is not None:
            self.sendMessage(data, True)
        else:
            self.sendMessage((text or "").encode(), False)

    def end(self, code: int, reason: str = "") -> None:
        """Close with any code; autobahn's sendClose() refuses 1001, 1008, 1011 and 1012."""
        if self.state == self.STATE_OPEN:
            payload = reason.encode()[:MAX_REASON].decode(errors="ignore").encode()
            self.sendCloseFrame(code=code, reasonUtf8=payload or None, isReply=False)

    def refuse(self) -> None:
        """Answer a handshake that nobody accepted with 403; nothing where it was decided already."""
        if hasattr(self, "handshake_deferred"):
            self.serverReject()

    def retire(self) -> None:
        """The process stops."""
        if self.state == self.STATE_CONNECTING:
            self.refuse()
        else:
            self.end(SERVICE_RESTART, "The server restarts.")

    # Flow control

    async def writable(self) -> None:
        """Return once the client has read what the transport held, or has gone."""
        while self._paused:
            waiter = self.server.loop.create_future()
            self._writers.append(waiter)
            await waiter

    def pauseProducing(self) -> None:
        self._paused = True

    def resumeProducing(self) -> None:
        self._release_writers()
        if self.transport.disconnecting:
            # Twisted closes a connection with a registered producer only when told again.
            self.transport.unregisterProducer()

    def stopProducing(self) -> None:
        self._release_writers()

    def _release_writers(self) -> None:
        self._paused = False
        for waiter in self._writers:
            if not waiter.done():
                waiter.set_result(None)
        self._writers.clear()


class Sockets(WebSocketFactory):  # type: ignore[misc]  # Daphne is untyped
    """Builds our protocol and gives it its server before the handshake."""

    protocol = WebSocket

    def buildProtocol(self, addr: Any) -> Any:
        protocol = super().buildProtocol(addr)
        protocol.server = self.server_class
        return protocol
