"""One client connection under our Daphne: framing by httptools, requests in order, limits, hang-ups and time-outs.

Stands where Twisted's HTTPChannel stands in stock Daphne (HTTPFactory.protocol), on the same Twisted transport. Upgrades go to
Daphne's WebSocket protocol. Uses private names of the transport (`_tempDataBuffer` and such), so Twisted's version is pinned.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, Any

import httptools
from twisted.internet.protocol import Protocol

from assistant_site import http_errors
from assistant_site.daphne_exchange import Exchange
from assistant_site.hang_up import hung_up
from assistant_site.http_scope import believe_forwarded, http_scope
from assistant_site.request_parser import RequestParser, head_without_upgrade

if TYPE_CHECKING:
    from assistant_site.daphne_server import DaphneServer

logger = logging.getLogger(__name__)

MAX_HEAD = 64 * 1024  # bytes of request line and headers; also of any stretch of a body in which nothing of the body comes
FOREVER = float("inf")


class Channel(Protocol):  # type: ignore[misc]  # Twisted is untyped here
    """One connection. `deaf` once its input no longer matters, `retiring` once it must close after what it is answering."""

    server: DaphneServer
    transport: Any

    def __init__(self, server: DaphneServer) -> None:
        self.server = server
        self.paused = False  # the transport holds more than it should: the client reads too slowly
        self.retiring = False
        # Both on server.clock; see expire().
        self.deadline = FOREVER
        self.stall_deadline = FOREVER
        self._deaf = False
        self._closing = False
        self._reading = True
        self._writers: list[asyncio.Future[None]] = []
        self._unsent = 0
        # Exchanges in order, the first one running; bytes stand for a refusal that ends the connection.
        self._queue: deque[Exchange | bytes] = deque()
        self._incoming: Exchange | None = None
        self._parser: Any = RequestParser(self)
        self._in_head = False
        self._raw_head_size = 0
        self._quiet = 0  # bytes since something of a body came: chunk extensions and trailers
        self._upgrading = False
        self._declined = False

    # Twisted's side

    def connectionMade(self) -> None:
        peer, host = self.transport.getPeer(), self.transport.getHost()
        self.client = (str(peer.host), peer.port) if hasattr(peer, "host") else None
        self.local = (str(host.host), host.port) if hasattr(host, "host") else None
        if self.local is not None:
            self.transport.setTcpNoDelay(True)
        self.transport.registerProducer(self, True)
        self.deadline = self.server.clock + self.server.deadlines.head
        self.server.channels.add(self)

    def connectionLost(self, reason: Any) -> None:
        self._deaf = self._closing = True
        self.server.channel_lost(self)
        for exchange in self._queue:
            if isinstance(exchange, Exchange):
                exchange.lose()
        self._queue.clear()
        self._release_writers()
        self._parser = None  # it holds us

    def dataReceived(self, data: bytes) -> None:
        if self._deaf:
            return
        self._quiet += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._upgrading:
                self._become_websocket(data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError:
            logger.exception("A request could not be taken in")
            self.abort()
        except httptools.HttpParserError:
            self._refuse(http_errors.bad_request())
        else:
            self._watch_input(len(data))

    def _watch_input(self, size: int) -> None:
        if self._in_head:
            self._raw_head_size += size
            if self._raw_head_size > MAX_HEAD:
                self._refuse(http_errors.head_too_large(MAX_HEAD))
        elif self._incoming is not None:
            if self._quiet > MAX_HEAD:
                self._refuse(http_errors.head_too_large(MAX_HEAD))
            elif self._reading:
                self.deadline = self.server.clock + self.server.deadlines.body

    # The parser's side

    def on_message_begin(self) -> None:
        if self._deaf:
            return
        self._in_head = True
        self._head_size = self._raw_head_size = 0
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._expect = self._upgrade = b""
        if not self._queue:
            self.deadline = self.server.clock + self.server.deadlines.head

    def on_url(self, target: bytes) -> None:
        self._target += target

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # a trailer, for which ASGI has no place
            return
        name = name.lower()
        self._head_size += len(name) + len(value)
        if b"_" in name:  # would collide with the same name with hyphens in CGI-style variables
            return
        if name == b"expect":
            self._expect = value.lower()
        elif name == b"upgrade":
            self._upgrade = value.lower()
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._deaf:
            return
        if self._head_size > MAX_HEAD:
            self._refuse(http_errors.head_too_large(MAX_HEAD))
            return
        self._quiet = 0
        method, version = self._parser.get_method().decode("ascii"), self._parser.get_http_version()
        if self._parser.should_upgrade() and method != "CONNECT":
            self._upgrading = method == "GET" and self._upgrade == b"websocket" and not self._queue
            self._declined = not self._upgrading
            return
        scope = http_scope(method, version, self._target, self._headers)
        if scope is None:
            self._refuse(http_errors.bad_request())
            return
        scope["client"], scope["server"] = self.client, self.local
        if self.server.forwarded:
            believe_forwarded(scope)
        exchange = Exchange(
            self,
            scope,
            keep_alive=version == "1.1" and self._parser.should_keep_alive(),
            expects_continue=self._expect == b"100-continue",
        )
        self._incoming = exchange
        self._queue.append(exchange)
        if len(self._queue) == 1:
            exchange.start()
        else:  # pipelined: no further bytes until its turn comes
            self.pause_reading()

    def declined_upgrade(self) -> bytes | None:
        declined, self._declined = self._declined, False
        return head_without_upgrade(self._parser, self._target, self._headers) if declined else None

    def on_body(self, data: bytes) -> None:
        self._quiet = 0
        if self._incoming is not None:
            self._incoming.feed(data)

    def on_message_complete(self) -> None:
        exchange, self._incoming = self._incoming, None
        if exchange is None:
            return
        exchange.feed_end()
        self.deadline = FOREVER
        if not exchange.keep_alive:
            self._deaf = True

    def _become_websocket(self, rest: bytes) -> None:
        """Hand the connection to Daphne's WebSocket protocol, which reads the request once more."""
        self._deaf = self._closing = True
        self.transport.unregisterProducer()
        self.server.channel_lost(self)
        lines = [b"%b %b HTTP/1.1\r\n" % (self._parser.get_method(), self._target)]
        # Daphne believes this header from anybody; the prefix of our paths is none of a client's business.
        lines += [b"%b: %b\r\n" % header for header in self._headers if header[0] != b"daphne-root-path"]
        self.server.adopt_websocket(self.transport, self._target.partition(b"?")[2], b"".join(lines) + b"\r\n" + rest)

    # The exchanges' side

    def write(self, data: bytes) -> None:
        """Send now what the socket takes; the transport keeps and sends the rest."""
        transport = self.transport
        if self._closing or not transport.connected:
            return
        if not transport.dataBuffer and not transport._tempDataBuffer:
            sent = transport.writeSomeData(data)
            if not isinstance(sent, int):  # the connection broke; the reader may be paused and never notice
                self.abort()
                return
            if sent == len(data):
                return
            data = data[sent:]
        transport.write(data)

    async def writable(self) -> None:
        """Return once the client has read what the transport held, or has gone."""
        while self.paused:
            waiter = self.server.loop.create_future()
            self._writers.append(waiter)
            await waiter

    def answered(self, exchange: Exchange) -> None:
        """The running exchange's answer is whole: go on with the next request, or close."""
        self._queue.popleft()
        if not exchange.body_complete:
            self._incoming = None
            self._linger()
        elif not exchange.keep_alive:
            self._close()
        elif self._queue:
            following = self._queue[0]
            if isinstance(following, bytes):
                self._say_goodbye(following)
            else:
                following.start()
                self.resume_reading()
        elif self.retiring:
            self._close()
        else:
            self.resume_reading()
            deadlines = self.server.deadlines
            self.deadline = self.server.clock + (deadlines.head if self._in_head else deadlines.keep_alive)

    def close_with(self, answer: bytes) -> None:
        """Give the running exchange this answer in its application's place, then close."""
        self._queue.clear()
        self._incoming = None
        self._say_goodbye(answer)

    def cut_off(self, abruptly: bool) -> None:
        """End the running exchange in mid-answer: after what was written so far, or abruptly with a reset."""
        self._queue.clear()
        self._incoming = None
        if abruptly:
            self.abort()
        else:
            self._close()

    def abort(self) -> None:
        """Drop the connection now."""
        self._deaf = self._closing = True
        self.transport.abortConnection()

    # Ways to end

    def retire(self) -> None:
        """The process stops: close now if nothing is being answered, else after it."""
        self.retiring = True
        if not self._queue and not self._closing:
            self._close()

    def expire(self) -> None:
        """A deadline passed: a slow head, body or reader, an idle connection, or one that would not close."""
        if self._unsent and self._unsent_now() < self._unsent:  # slow, but reading
            self._unsent = self._unsent_now()
            self.deadline = FOREVER if self.paused else self.server.clock + self.server.deadlines.close
            self.stall_deadline = self.server.clock + self.server.deadlines.stalled if self.paused else FOREVER
        elif self._closing or self._queue or self._in_head:
            self.abort()
        else:
            self._close()

    def look_for_hang_up(self) -> None:
        """While nothing is read, as with requests waiting behind the running one, no event tells that the client has gone."""
        if not self._reading and not self._closing and hung_up(self.transport.getHandle().fileno()):
            self.abort()

    def _unsent_now(self) -> int:
        """Bytes the transport still holds."""
        transport = self.transport
        return int(len(transport.dataBuffer) - transport.offset + transport._tempDataLen)

    def _refuse(self, answer: bytes) -> None:
        """The input can be read no further; answer so when the requests before it are answered."""
        self._deaf = True
        broken, self._incoming = self._incoming, None
        if broken is not None:
            self._queue.remove(broken)
            broken.lose()
            if broken.written:
                self.abort()
                return
        if self._queue:
            self._queue.append(answer)
        else:
            self._say_goodbye(answer)

    def _say_goodbye(self, answer: bytes) -> None:
        self.write(answer)
        self._linger()

    def _linger(self) -> None:
        """Half-close and discard input for a while: a client that sends everything first can then read the answer."""
        self._deaf = True
        self._unregister()
        self._queue.clear()
        self.resume_reading()
        self.transport.loseWriteConnection()
        self.deadline = self.server.clock + self.server.deadlines.discard

    def _close(self) -> None:
        self._deaf = True
        self._unregister()
        self.transport.loseConnection()
        self.deadline = self.server.clock + self.server.deadlines.close

    def _unregister(self) -> None:
        # With a paused producer registered, Twisted forgets to close once its buffer is empty.
        self._closing = True
        self._unsent = self._unsent_now()
        self.transport.unregisterProducer()
        self._release_writers()

    # Flow control

    def pauseProducing(self) -> None:
        self.paused = True
        self._unsent = self._unsent_now()
        self.stall_deadline = self.server.clock + self.server.deadlines.stalled

    def resumeProducing(self) -> None:
        self._release_writers()

    def stopProducing(self) -> None:
        self._release_writers()

    def _release_writers(self) -> None:
        self.paused = False
        self.stall_deadline = FOREVER
        for waiter in self._writers:
            if not waiter.done():
                waiter.set_result(None)
        self._writers.clear()

    def pause_reading(self) -> None:
        """Read no more until resume_reading(); the client's waiting is our doing, so no deadline runs."""
        if self._reading:
            self._reading = False
            self.deadline = FOREVER
            self.transport.pauseProducing()

    def resume_reading(self) -> None:
        """Read again, unless requests queue up behind the running one."""
        if not self._reading and len(self._queue) <= 1:
            self._reading = True
            self.deadline = FOREVER if self._incoming is None else self.server.clock + self.server.deadlines.body
            self.transport.resumeProducing()
