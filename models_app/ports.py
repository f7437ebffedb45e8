"""Loopback ports of engines. A port is tested by binding it; the database keeps it from being given twice."""

from __future__ import annotations

import random
import socket
from collections.abc import Collection, Iterator
from typing import Any, Protocol

import psutil

from models_app.exceptions import PreflightError
from models_app.process_identity import ProcessIdentity, alive

HOST = "127.0.0.1"
LUCKY_TRIES = 20


class Connection(Protocol):
    """The part of psutil's connection tuples that matters here."""

    @property
    def status(self) -> str: ...
    @property
    def laddr(self) -> Any: ...


def bindable(port: int) -> bool:
    """Whether a server of ours could listen on this port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As every server does: a finished connection in TIME_WAIT is no reason against the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def choose(wanted: int | None, taken: Collection[int], span: tuple[int, int]) -> int:
    """The wanted port, or a free one of the span (both ends included). Raises PreflightError naming who holds it."""
    if wanted is not None:
        if wanted in taken:
            raise PreflightError(f"Port {wanted} is in use by another instance; choose another port or leave it empty.")
        if not bindable(wanted):
            raise PreflightError(f"Port {wanted} is in use by {holder(wanted)}; choose another port or leave it empty.")
        return wanted
    low, high = span
    for port in _candidates(low, high):
        if port not in taken and bindable(port):
            return port
    raise PreflightError(f"No port from {low} to {high} is free; stop something or widen ASSISTANT_ENGINE_PORTS.")


def _candidates(low: int, high: int) -> Iterator[int]:
    """Every port of the span. Not in order: a port just freed may still be in somebody's connection pool."""
    for _ in range(LUCKY_TRIES):  # shuffling thousands takes longer than everything else in a start
        yield random.randint(low, high)  # noqa: S311  # nobody need be surprised by it
    yield from random.sample(range(low, high + 1), high + 1 - low)


def holder(port: int) -> str:
    """Who listens on this port, as a phrase for a sentence."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.pid is not None and _is_listener(connection, port):
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass
    return "another program"


def _is_listener(connection: Connection, port: int) -> bool:
    return connection.status == psutil.CONN_LISTEN and bool(connection.laddr) and connection.laddr[1] == port


def listens(identity: ProcessIdentity, port: int) -> bool:
    """Whether the listening socket of this port belongs to exactly this process or a child of it."""
    try:
        process = psutil.Process(identity.pid)
        family = [process, *process.children(recursive=True)]
        found = any(_is_listener(connection, port) for member in family for connection in member.net_connections("tcp"))
    except psutil.Error:
        return False
    return found and alive(identity)
