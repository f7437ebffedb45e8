"""Figures beside their targets: one table for the machine's own figures, one per server of the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tests.bench.measuring import Basics, Gateway, Results

PASS, SHORT, UNKNOWN = "pass", "falls short", "not measured"
NO_NGINX: Final = "nginx is not installed"


@dataclass(frozen=True)
class Targets:
    """What one server of the gateway is to reach on one core. None: no target."""

    plain_per_s: float
    plain_p99_ms: float | None
    plain_of_nginx: float | None
    streamed_of_nginx: float
    cpu_us_per_event: float


TARGETS: Final = {
    "uvicorn": Targets(6000, None, 0.10, 0.9, 15),
    "daphne": Targets(4500, 20, None, 0.6, 40),
}
LATE_P50_MS, ADDED_P50_MS, ADDED_P99_MS, ADDED_FIRST_P99_MS, MOVED_P99_MS = 2.0, 0.6, 2.0, 10.0, 2.0
GATEWAY_IDLE_MB, CONSOLE_IDLE_MB = 100.0, 180.0


@dataclass(frozen=True)
class Line:
    """One row: what is wanted, what was found, and whether that is enough."""

    target: str
    measured: str
    verdict: str


def _at_most(what: str, limit: float, found: float, unit: str, note: str = "") -> Line:
    return Line(f"{what} ≤ {limit:g} {unit}", f"{found:.2f} {unit}{note}", PASS if found <= limit else SHORT)


def _at_least(what: str, limit: float, found: float | None, unit: str, note: str = "") -> Line:
    if found is None:
        return Line(f"{what} ≥ {limit:g} {unit}", NO_NGINX, UNKNOWN)
    shown = f"{found:,.0f}" if found >= 100 else f"{found:.2f}"
    return Line(f"{what} ≥ {limit:g} {unit}", f"{shown} {unit}{note}", PASS if found >= limit else SHORT)


def lines(gateway: Gateway, results: Results) -> Iterator[Line]:
    """The table of one server."""
    yield from _rates(gateway, results)
    yield from _streams(gateway, results)
    yield from _one_connection(gateway, results)
    memory = gateway.memory
    after = f" (after {memory.requests:,} requests: {memory.gateway_after:.1f})"
    yield _at_most("gateway memory idle", GATEWAY_IDLE_MB, memory.gateway_idle, "MB", after)
    after = f" (after its pages: {memory.console_after:.1f})"
    yield _at_most("console memory idle", CONSOLE_IDLE_MB, memory.console_idle, "MB", after)


def _rates(gateway: Gateway, results: Results) -> Iterator[Line]:
    wanted, nginx = TARGETS[gateway.server], results.nginx
    plain, streamed = gateway.basics.plain, gateway.basics.streamed
    note = f" ({plain.cpu_us:.0f} µs CPU each, core {plain.busy:.0%} busy)"
    yield _at_least("plain, 32 connections", wanted.plain_per_s, plain.rate.per_s, "requests/s", note)
    if wanted.plain_p99_ms is not None:
        yield _at_most("plain, 32 connections, p99", wanted.plain_p99_ms, plain.rate.p99_ms, "ms")
    if wanted.plain_of_nginx is not None:
        found = plain.rate.per_s / nginx.basics.plain.rate.per_s if nginx else None
        yield _at_least("plain, of nginx", wanted.plain_of_nginx, found, "×")
    note = f" ({streamed.cpu_us:.0f} µs CPU each, core {streamed.busy:.0%} busy)"
    found = streamed.rate.per_s / nginx.basics.streamed.rate.per_s if nginx else None
    yield _at_least("streamed, 100 events at once, of nginx", wanted.streamed_of_nginx, found, "×", note)


def _streams(gateway: Gateway, results: Results) -> Iterator[Line]:
    wanted = TARGETS[gateway.server]
    for place, (relayed, direct) in enumerate(zip(gateway.relayed, results.direct_paced, strict=True)):
        seen, what = relayed.paced, f"{relayed.paced.streams} paced streams"
        note = f" (nginx {results.nginx.relayed[place].cpu_us_per_event:.1f})" if results.nginx else ""
        yield _at_most(f"{what}: CPU per event", wanted.cpu_us_per_event, relayed.cpu_us_per_event, "µs", note)
        note = f" (p99 {seen.late_p99_ms:.2f}; direct {direct.late_p50_ms:.2f} and {direct.late_p99_ms:.2f})"
        yield _at_most(f"{what}: lateness, median", LATE_P50_MS, seen.late_p50_ms, "ms", note)
        added = seen.first_p99_ms - direct.first_p99_ms
        note = f" (p50 {seen.first_p50_ms - direct.first_p50_ms:.2f})"
        if seen.streams == 64:
            yield _at_most(f"{what}: added to the first event, p99", ADDED_FIRST_P99_MS, added, "ms", note)
        else:
            yield Line(f"{what}: added to the first event, p99", f"{added:.2f} ms{note}", "")


def _one_connection(gateway: Gateway, results: Results) -> Iterator[Line]:
    one, direct, beside = gateway.basics.one, results.direct.one, gateway.beside
    note = f" ({one.p50_ms:.2f} − {direct.p50_ms:.2f})"
    yield _at_most("added at one connection, p50", ADDED_P50_MS, one.p50_ms - direct.p50_ms, "ms", note)
    note = f" ({one.p99_ms:.2f} − {direct.p99_ms:.2f})"
    yield _at_most("added at one connection, p99", ADDED_P99_MS, one.p99_ms - direct.p99_ms, "ms", note)
    chat, alone = beside.chat_beside, beside.direct_beside
    note = f" ({chat.p99_ms:.2f} − {alone.p99_ms:.2f} ms, {beside.pages} pages loaded meanwhile)"
    yield _at_most("… beside two browsers, p50", ADDED_P50_MS, chat.p50_ms - alone.p50_ms, "ms")
    yield _at_most("… beside two browsers, p99", ADDED_P99_MS, chat.p99_ms - alone.p99_ms, "ms", note)
    moved = beside.models_beside.p99_ms - beside.models.p99_ms
    note = (
        f" ({beside.models.p99_ms:.2f} alone, {beside.models_beside.p99_ms:.2f} beside; the stand-in itself {alone.p99_ms:.2f})"
    )
    yield _at_most("/v1/models p99 moved by two browsers", MOVED_P99_MS, moved, "ms", note)


def _row(name: str, *cells: str) -> str:
    return f"{name:8}" + "".join(f"{cell:>10}" for cell in cells)


def _basics(name: str, basics: Basics) -> str:
    cells = []
    for loaded in (basics.plain, basics.streamed):
        rate = loaded.rate
        cells += [f"{rate.per_s:,.0f}", f"{rate.p50_ms:.2f}", f"{rate.p99_ms:.2f}", f"{loaded.cpu_us:.0f}"]
    return _row(name, *cells, f"{basics.one.p50_ms:.3f}", f"{basics.one.p99_ms:.3f}")


def text(results: Results) -> str:
    """All of it, for people."""
    rate = ("p50 ms", "p99 ms", "CPU µs")
    out = [_row("", "plain/s", *rate, "streams/s", *rate, "1: p50 ms", "p99 ms")]
    out.append(_basics("direct", results.direct))
    if results.nginx is not None:
        out.append(_basics("nginx", results.nginx.basics))
    out += [_basics(gateway.server, gateway.basics) for gateway in results.gateways]
    for gateway in results.gateways:
        rows = list(lines(gateway, results))
        wide = max(len(row.target) for row in rows)
        broad = max(len(row.measured) for row in rows)
        out += ["", f"The gateway on {gateway.server}", f"{'target':{wide}} | {'measured':{broad}} | verdict"]
        out += [f"{row.target:{wide}} | {row.measured:{broad}} | {row.verdict}" for row in rows]
    return "\n".join(out)
