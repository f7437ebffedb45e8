"""Ports: the public addresses are free or ours, engines find one, and no two models were given the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from django.conf import settings

from models_app import ports
from models_app.doctor.finding import Context, Finding, fail, ok, warn
from models_app.models import Instance, ModelConfig

PUBLIC = (("ASSISTANT_HTTP_ADDR", "gateway"), ("ASSISTANT_GRPC_ADDR", "grpcserver"))
FEW_PORTS = 100
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass(frozen=True, slots=True)
class Listener:
    """Who has the listening socket of a port. argv is empty where we may not know."""

    pid: int | None
    name: str
    argv: tuple[str, ...]


def check_public(context: Context) -> Iterable[Finding]:
    for setting, command in PUBLIC:
        host, port = getattr(settings, setting)
        yield judge_public(f"{host}:{port}", setting, command, listener(port), context)


def listener(port: int) -> Listener | None:
    """The process that listens on this TCP port of any address, None where none does."""
    with suppress(psutil.Error):
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port:
                return _described(one.pid)
    return None


def _described(pid: int | None) -> Listener:
    with suppress(psutil.Error):
        process = psutil.Process(pid) if pid is not None else None
        if process is not None:
            return Listener(pid, process.name(), tuple(process.cmdline()))
    return Listener(pid, "another user's program", ())


def judge_public(address: str, setting: str, command: str, found: Listener | None, context: Context) -> Finding:
    """command: the manage.py command that should be there."""
    if found is None:
        if context.running:
            return fail(f"Nobody listens on {address}, where {command} should.", f"See logs/{command}.log under ASSISTANT_HOME.")
        return ok(f"{address} is free for {command}.")
    if command in found.argv:
        return ok(f"{command} listens on {address}.")
    holder = found.name if found.pid is None else f"{found.name}, pid {found.pid}"
    return fail(f"{address} is taken by another program ({holder}).", f"Stop it, or set {setting}.")


def check_engine_ports(context: Context) -> Iterable[Finding]:
    low, high = settings.ASSISTANT_ENGINE_PORTS
    span = range(low, high + 1)
    if not context.fast:
        yield judge_span(low, high, sum(map(ports.bindable, span)))
    yield from judge_overlaps(span, [getattr(settings, setting)[1] for setting, _ in PUBLIC], _ephemeral())


def judge_span(low: int, high: int, free: int) -> Finding:
    told = f"{free} of the {high + 1 - low} ports for engines, {low} to {high}, are free"
    if free == 0:
        return fail(f"{told}.", "Stop what holds them, or widen ASSISTANT_ENGINE_PORTS.")
    return warn(f"{told}.", "Stop what holds them, or widen ASSISTANT_ENGINE_PORTS.") if free < FEW_PORTS else ok(f"{told}.")


def _ephemeral() -> range | None:
    """Ports that the kernel gives to outgoing connections."""
    try:
        low, high = map(int, EPHEMERAL.read_text().split())
    except (OSError, ValueError):
        return None
    return range(low, high + 1)


def judge_overlaps(span: range, public: Sequence[int], ephemeral: range | None) -> Iterator[Finding]:
    for port in public:
        if port in span:
            yield warn(
                f"Port {port} is public and among the ports for engines.",
                "Choose another port for it, outside ASSISTANT_ENGINE_PORTS.",
            )
    if ephemeral is not None and span.start < ephemeral.stop and ephemeral.start < span.stop:
        yield warn(
            f"Ports for engines overlap with those of outgoing connections ({ephemeral.start} to {ephemeral.stop - 1}), "
            "which may take one at any time.",
            "Move ASSISTANT_ENGINE_PORTS below them.",
        )


def check_fixed(context: Context) -> Iterable[Finding]:
    fixed = [
        Fixed(model.name, model.port, model.max_replicas * max(1, len(model.parts)))
        for model in ModelConfig.objects.enabled()
        if model.port is not None
    ]
    ours = set(Instance.objects.with_process().exclude(port=None).values_list("port", flat=True))
    findings = list(judge_fixed(fixed, {setting: getattr(settings, setting)[1] for setting, _ in PUBLIC}))
    findings += [
        fail(f"Port {one.port} of {one.model} is in use by {ports.holder(one.port)}.", "Free it, or change it.")
        for one in fixed
        if one.port not in ours and not ports.bindable(one.port)
    ]
    return findings or [ok("No model's port is in the way of another." if fixed else "No model has a fixed port.")]


@dataclass(frozen=True, slots=True)
class Fixed:
    """A model with a port of its own, and how many processes may want it."""

    model: str
    port: int
    processes: int


def judge_fixed(models: Sequence[Fixed], public: dict[str, int]) -> Iterator[Finding]:
    seen: dict[int, str] = {}
    for one in models:
        if one.port in seen:
            yield fail(f"{one.model} and {seen[one.port]} have the same port {one.port}.", "Give one of them another, or none.")
        seen[one.port] = one.model
        if one.processes > 1:
            yield warn(
                f"{one.model} may want {one.processes} processes and has one port, {one.port}, for them on each node.",
                "Leave its port empty.",
            )
        for setting, port in public.items():
            if port == one.port:
                yield fail(f"{one.model} has the port of {setting}, {port}.", "Give it another, or none.")
