"""Runs a service on Daphne or uvicorn: bind, start the service, listen, drain on TERM or INT, stop the service.

Neither server's own life cycle will do: Daphne sends no lifespan events, both take signals in their own way, and a taken
address must be named before the service starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import uvloop

from assistant_site.asgi_types import ASGIApplication
from assistant_site.binding import AddressInUse, Listener
from assistant_site.body_limit import BodyLimit
from assistant_site.deadlines import DEFAULT, Deadlines

logger = logging.getLogger(__name__)

STOP_S = 5.0  # for a service to stop once nothing runs any more


class Service(Protocol):
    """What a process serves. start() comes before the first request, stop() after the last; drain() says the end is near."""

    @property
    def application(self) -> Callable[[Any, Any, Any], Awaitable[None]]: ...

    async def start(self) -> None: ...

    def drain(self) -> None: ...

    async def stop(self) -> None: ...


class HttpServer(Protocol):
    """One of our two servers."""

    async def start(self, listener: Any) -> None:
        """Listen on a bound socket."""

    async def drain(self, seconds: float, cut: asyncio.Event) -> None:
        """Take no more, let what runs end for some seconds or until `cut` is set, end the rest."""


class Signals:
    """TERM and INT: the first asks for the end, the second for the end at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received, number)

    def _received(self, number: signal.Signals) -> None:
        logger.info("%s received", signal.Signals(number).name)
        (self.insisted if self.asked.is_set() else self.asked).set()


@dataclass(frozen=True, slots=True)
class Serving:
    """How to serve. `forwarded` (Daphne only) believes X-Forwarded-* of whoever reaches the socket."""

    server: str  # "daphne" or "uvicorn"
    drain_s: float  # for running requests to end after TERM
    max_body: int  # bytes
    forwarded: bool = False
    deadlines: Deadlines = DEFAULT


def run(service: Service, listener: Listener, serving: Serving) -> int:
    """Serve until TERM or INT; the exit code."""
    application: ASGIApplication = BodyLimit(service.application, serving.max_body)
    runs = {"daphne": _on_daphne, "uvicorn": _on_uvicorn}[serving.server]
    try:
        runs(service, application, listener, serving)
    except AddressInUse as error:
        logger.error("%s", error)  # the sentence says it all
        return 1
    finally:
        listener.close()
        silence_broken_pipes()
    return 0


def _on_daphne(service: Service, application: ASGIApplication, listener: Listener, serving: Serving) -> None:
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    from twisted.internet import asyncioreactor  # importing daphne.server before this would install a reactor on another loop

    asyncioreactor.install(loop)
    from twisted.internet import reactor

    from assistant_site.daphne_server import DaphneServer

    http = DaphneServer(application, forwarded=serving.forwarded, deadlines=serving.deadlines)
    life = loop.create_task(_live(service, http, listener, serving.drain_s))
    life.add_done_callback(lambda _: reactor.stop())
    reactor.run(installSignalHandlers=False)
    life.result()


def _on_uvicorn(service: Service, application: ASGIApplication, listener: Listener, serving: Serving) -> None:
    from assistant_site.uvicorn_server import UvicornServer

    if serving.forwarded:
        raise ValueError("Forwarded headers are read on Daphne only.")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_live(service, UvicornServer(application, serving.deadlines), listener, serving.drain_s))


async def _live(service: Service, http: HttpServer, listener: Listener, drain_s: float) -> None:
    """The whole life of the process."""
    signals = Signals(asyncio.get_running_loop())
    try:
        if await _started(service, signals):
            await _listen(http, listener)
            await signals.asked.wait()
            service.drain()
            await http.drain(drain_s, signals.insisted)
    finally:
        await _stop(service)
    logger.info("Stopped")


async def _started(service: Service, signals: Signals) -> bool:
    """Whether the service started before somebody asked for the end."""
    starting = asyncio.ensure_future(service.start())
    asked = asyncio.ensure_future(signals.asked.wait())
    try:
        await asyncio.wait({starting, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return False
        starting.result()
        return True
    finally:
        for task in (starting, asked):
            task.cancel()
        await asyncio.gather(starting, asked, return_exceptions=True)


async def _listen(http: HttpServer, listener: Listener) -> None:
    try:
        await http.start(listener.socket)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise listener.in_use() from error
        raise
    if listener.path is not None:
        listener.path.chmod(0o700)  # Twisted opens its sockets to everybody
    # What lives now lives on; the collector need not walk it again and again while requests come.
    gc.collect()
    gc.freeze()
    logger.info("Listening on %s", listener.name)


async def _stop(service: Service) -> None:
    try:
        async with asyncio.timeout(STOP_S):
            await service.stop()
    except TimeoutError:
        logger.error("The service did not stop within %s s", STOP_S)  # where it hung says nothing


def silence_broken_pipes() -> None:
    """A supervisor that died leaves broken pipes; Python would turn its last flush into exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
