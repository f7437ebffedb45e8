"""The data plane as one service: what it owns, in which order it starts, and how it ends."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from channels.routing import ProtocolTypeRouter
from django.conf import settings

from gateway_app.asgi import ASGIApplication, Entry
from gateway_app.console_relay import ConsoleRelay
from gateway_app.control_link import ControlLink
from gateway_app.directory import Directory
from gateway_app.endpoints.http import Receive, Scope, Send
from gateway_app.endpoints.inference import Parts
from gateway_app.endpoints.readiness import Readiness
from gateway_app.endpoints.relay import Patience, SlowReaders
from gateway_app.endpoints.waiting import WaitingRoom
from gateway_app.keys import Keys
from gateway_app.limits import Limits
from gateway_app.loads import Loads
from gateway_app.metering import Meter
from gateway_app.routing.backends import Backend
from gateway_app.routing.demand import Demand
from gateway_app.routing.slots import Slots
from gateway_app.snapshot import Feed, Update
from gateway_app.upstream.http import UpstreamPool

UNREACHABLE_S = 1.0  # how long an instance that refused a connection is left alone


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """What one gateway is told. Sizes in bytes, times in seconds."""

    node: str
    redis_url: str = field(repr=False)
    installation_secret: str = field(repr=False)
    console_socket: Path
    spool_dir: Path
    max_body: int
    max_wait_s: float
    patience: Patience = field(default_factory=Patience)


class Console(Protocol):
    """Whatever answers everything but the data plane's own paths, HTTP and WebSocket."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class Gateway:
    """A Service (see the runner): application, start, drain, stop."""

    application: ASGIApplication

    def __init__(self, config: GatewayConfig, console: Console) -> None:
        self.id = f"{config.node}-{secrets.token_hex(4)}"
        self.directory = Directory()
        self.draining = False
        self._spool_dir = config.spool_dir
        self.limits = Limits()
        self.feed = Feed(config.installation_secret, self._take_over)
        self.keys = Keys(self.feed.recheck)
        self.pool = UpstreamPool()
        self.meter = Meter(config.spool_dir, self.id)
        self.slots = Slots(drained=lambda _: self.link.hasten())
        self.demand = Demand(first=lambda: self.link.hasten())
        loads = Loads()
        self.link = ControlLink(
            config.redis_url, self.id, config.node, slots=self.slots, demand=self.demand, loads=loads, on_hint=self.feed.hint
        )
        self.readers = SlowReaders(config.patience)
        self.console = console
        parts = Parts(
            directory=lambda: self.directory, recheck=self.feed.recheck, keys=self.keys, limits=self.limits, meter=self.meter,
            slots=self.slots, waiting_room=WaitingRoom(self.slots, self.demand, loads), pool=self.pool, readers=self.readers,
            patience=config.patience, unreachable=self._unreachable, max_body=config.max_body, max_wait_s=config.max_wait_s,
        )  # fmt: skip
        checks = {
            "not_draining": lambda: not self.draining,
            "database": lambda: not self.feed.stale,
            "valkey": lambda: bool(self.link.up),
        }
        entry = Entry(parts, Readiness(checks, config.console_socket), console)
        self.application = ProtocolTypeRouter({"http": entry, "websocket": console})

    @classmethod
    def from_settings(cls) -> Gateway:
        """The gateway of this installation."""
        return cls(
            GatewayConfig(
                node=settings.ASSISTANT_NODE,
                redis_url=settings.REDIS_URL,
                installation_secret=settings.SECRET_KEY,
                console_socket=settings.ASSISTANT_CONSOLE_SOCKET,
                spool_dir=settings.ASSISTANT_SPOOL_DIR,
                max_body=settings.ASSISTANT_MAX_BODY,
                max_wait_s=settings.ASSISTANT_MAX_WAIT_S,
            ),
            ConsoleRelay(str(settings.ASSISTANT_CONSOLE_SOCKET), settings.ASSISTANT_TRUSTED_PROXIES),
        )

    async def start(self) -> None:
        """First snapshot, then the link. Raises django.db.Error where the database gives none; Valkey may be away."""
        self._spool_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        await self.feed.start()
        await self.link.start()
        await self.console.start()
        self.readers.start()

    def drain(self) -> None:
        """TERM came: /readyz says no from here on; what still comes is served."""
        self.draining = True

    async def stop(self) -> None:
        """Give everything back; no request runs any more."""
        await self.readers.stop()
        await self.console.stop()
        await self.link.stop()
        await self.feed.stop()
        self.meter.close()
        await self.pool.close()

    def _take_over(self, update: Update) -> None:
        """On the event loop: one step of the snapshot."""
        if update.table is not None:
            self.keys.table = update.table
        self.keys.table.apply(update.keys, update.removed_keys)
        if update.directory is not None:
            self._switch(update.directory)

    def _switch(self, directory: Directory) -> None:
        old, self.directory = self.directory, directory
        for ident, backend in old.backends.items():
            if ident not in directory.backends:
                backend.retired = True
        for backend in directory.backends.values():
            backend.retired = False
        self.link.adopt(directory.models, directory.backends.values())
        self.slots.refresh(directory.models)

    def _unreachable(self, backend: Backend) -> None:
        """Nothing listens at this instance: leave it alone for a moment, until health has seen it or it is back.

        Remote servers are asked again at once, since nobody here restarts them and their errors should be quick.
        """
        if backend.instance is None or backend.suspended:
            return
        backend.suspended = True
        asyncio.get_running_loop().call_later(UNREACHABLE_S, self._try_again, backend)

    def _try_again(self, backend: Backend) -> None:
        backend.suspended = False
        self.slots.reopened(backend)
