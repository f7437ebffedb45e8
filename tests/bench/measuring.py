"""What is measured of whom, in one order for all: first the stand-in itself and nginx, then the gateway on each server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from tests.bench import paced
from tests.bench.browsers import reloading
from tests.bench.home import PACED_MODEL
from tests.bench.load import MODELS, Rate, Target, closed_loop
from tests.bench.paced import Paced
from tests.bench.stage import Running
from tests.bench.upstream import PACED

CONNECTIONS: Final = 32
STREAMS: Final = (64, 512)
WARM_UP_S: Final = 1.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Basics:
    """Closed-loop figures that exist for any server: 32 connections plain and streamed, one connection."""

    plain: Loaded
    streamed: Loaded
    one: Rate

    def rates(self) -> tuple[Rate, ...]:
        """All of them."""
        return self.plain.rate, self.streamed.rate, self.one


@dataclass(frozen=True)
class Loaded:
    """A rate, and the CPU time the server spent on each request: of the two, the one a busy machine moves less."""

    rate: Rate
    cpu_us: float

    @property
    def busy(self) -> float:
        """Share of one core the server used. Well below 1, something else was the limit."""
        return self.rate.per_s * self.cpu_us / 1e6


@dataclass(frozen=True)
class Relayed:
    """Paced streams, and the CPU time the gateway spent per event of them, setting up included."""

    paced: Paced
    cpu_us_per_event: float


@dataclass(frozen=True)
class Beside:
    """One connection while nobody else asks, and while two browsers reload an admin list; the same of the stand-in itself,
    which shares nothing with the gateway but the machine.
    """

    models: Rate
    models_beside: Rate
    chat_beside: Rate
    direct_beside: Rate
    pages: int


@dataclass(frozen=True)
class Memory:
    """Resident MB: after the start, and after all that was measured."""

    gateway_idle: float
    gateway_after: float
    console_idle: float
    console_after: float
    requests: int


@dataclass(frozen=True)
class Gateway:
    """Everything about the gateway on one server."""

    server: str
    basics: Basics
    relayed: tuple[Relayed, ...]
    beside: Beside
    memory: Memory


@dataclass(frozen=True)
class Peer:
    """A plain proxy before the same stand-in."""

    basics: Basics
    relayed: tuple[Relayed, ...]


@dataclass(frozen=True)
class Results:
    """One run. nginx: None where it is not installed."""

    direct: Basics
    direct_paced: tuple[Paced, ...]
    nginx: Peer | None
    gateways: tuple[Gateway, ...]

    def bad(self) -> int:
        """Answers and streams that went wrong; of a machine at rest, none."""
        proxies: list[Gateway | Peer] = [*self.gateways, *([self.nginx] if self.nginx else [])]
        rates = [rate for basics in (self.direct, *(proxy.basics for proxy in proxies)) for rate in basics.rates()]
        for gateway in self.gateways:
            beside = gateway.beside
            rates += [beside.models, beside.models_beside, beside.chat_beside, beside.direct_beside]
        streams = [*self.direct_paced, *(relayed.paced for proxy in proxies for relayed in proxy.relayed)]
        return sum(rate.bad for rate in rates) + sum(stream.broken for stream in streams)


class Measuring:
    """seconds: of each single run. say: told what is being measured."""

    def __init__(self, seconds: float, say: Say) -> None:
        self._seconds = seconds
        self._say = say

    def basics(self, name: str, target: Target, server: Running) -> Basics:
        """The closed-loop figures, after a short warm-up."""
        self._say(f"{name}: plain, streamed, one connection")
        closed_loop(target, stream=False, connections=8, seconds=WARM_UP_S)
        return Basics(
            plain=self._loaded(target, server, stream=False),
            streamed=self._loaded(target, server, stream=True),
            one=self._loop(target, 1),
        )

    def direct_paced(self, upstream: Target) -> tuple[Paced, ...]:
        """What the stand-in and the readers themselves take."""
        target = replace(upstream, path=PACED + upstream.path)
        return tuple(self._paced("direct", target, streams) for streams in STREAMS)

    def peer(self, name: str, target: Target, server: Running) -> Peer:
        """A plain proxy, which knows no models: the path says which streams are paced."""
        relayed = self._relayed(name, replace(target, path=PACED + target.path), server)
        return Peer(self.basics(name, target, server), relayed)

    def gateway(self, server: str, target: Target, upstream: Target, cookie: str, us: Running, console: Running) -> Gateway:
        """Everything about one gateway that has just started."""
        idle, console_idle = us.rss_mb(), console.rss_mb()
        basics = self.basics(server, target, us)
        relayed = self._relayed(server, replace(target, model=PACED_MODEL), us)
        with us.free_to_move():
            beside = self._beside(server, target, upstream, cookie)
        memory = Memory(idle, us.rss_mb(), console_idle, console.rss_mb(), _requests(basics, beside))
        return Gateway(server, basics, relayed, beside, memory)

    def _relayed(self, name: str, target: Target, server: Running) -> tuple[Relayed, ...]:
        relayed = []
        for streams in STREAMS:
            before = server.cpu_s()
            seen = self._paced(name, target, streams)
            relayed.append(Relayed(seen, (server.cpu_s() - before) / max(1, seen.events) * 1e6))
        return tuple(relayed)

    def _paced(self, name: str, target: Target, streams: int) -> Paced:
        self._say(f"{name}: {streams} paced streams")
        return paced.run(target, streams=streams, seconds=self._seconds)

    def _beside(self, server: str, target: Target, upstream: Target, cookie: str) -> Beside:
        self._say(f"{server}: one connection beside two browsers")
        models = replace(target, path=MODELS, get=True)
        alone = self._loop(models, 1)
        with reloading(target.port, cookie) as pages:
            beside = self._loop(models, 1)
            chat = self._loop(target, 1)
            direct = self._loop(upstream, 1)
        return Beside(alone, beside, chat, direct, pages.loaded)

    def _loaded(self, target: Target, server: Running, *, stream: bool) -> Loaded:
        before = server.cpu_s()
        rate = self._loop(target, CONNECTIONS, stream=stream)
        return Loaded(rate, (server.cpu_s() - before) / max(1, rate.requests) * 1e6)

    def _loop(self, target: Target, connections: int, *, stream: bool = False) -> Rate:
        return closed_loop(target, stream=stream, connections=connections, seconds=self._seconds)


def _requests(basics: Basics, beside: Beside) -> int:
    rates = (*basics.rates(), beside.models, beside.models_beside, beside.chat_beside)
    return sum(rate.requests for rate in rates)
