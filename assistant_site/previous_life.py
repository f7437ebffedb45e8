"""One `up` per home: its lock, the mark its children carry, and the end of children whose `up` was killed.

Engines and their shims are no children of ours: they outlive everything (a kill of `up`, a stop with --keep-engines) and are
adopted, so the sweep leaves them alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

MARK = "ASSISTANT_UP"
ENGINE_MARK = b"ASSISTANT_INSTANCE="
TERM_GRACE_S = 5.0
KILL_GRACE_S = 5.0
ROUNDS = 3  # a process that is ended may just have forked


class AlreadyRunning(Exception):
    """Another `up` holds the lock; str() is what to tell the user."""


@contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Hold the lock while the block runs. Raises AlreadyRunning naming the holder's pid."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode().strip()
            raise AlreadyRunning(f"Assistant is already running here, pid {holder or 'unknown'}.") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def mark_of(home: Path) -> str:
    """What the children of this home's `up` carry in their environment under MARK."""
    return hashlib.sha256(str(home).encode()).hexdigest()[:16]


def survivors(mark: str) -> list[int]:
    """Pids that carry the mark: neither this process, nor one above it, nor an engine or its shim."""
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if pid not in spared and _carries(pid, mark)]


def end_survivors(mark: str, grace_s: float = TERM_GRACE_S) -> tuple[int, list[int]]:
    """TERM everything that carries the mark, KILL what is left after the grace: (how many ended, pids that would not)."""
    ended = 0
    left = survivors(mark)
    for _ in range(ROUNDS):
        if not left:
            break
        count = len(left)
        _end(left, mark, grace_s)
        left = survivors(mark)
        ended += max(0, count - len(left))
    return ended, left


def _carries(pid: int, mark: str) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, or another user's
        return False
    return f"{MARK}={mark}".encode() in variables and not any(variable.startswith(ENGINE_MARK) for variable in variables)


def _end(pids: list[int], mark: str, grace_s: float) -> None:
    with ExitStack() as opened:
        handles = []
        for pid in pids:
            with suppress(ProcessLookupError):
                handle = os.pidfd_open(pid)
                opened.callback(os.close, handle)
                if _carries(pid, mark):  # asked again with the handle in hand: a reused pid is never signalled
                    handles.append(handle)
        alive = _signal_and_wait(handles, signal.SIGTERM, grace_s)
        _signal_and_wait(alive, signal.SIGKILL, KILL_GRACE_S)


def _signal_and_wait(handles: list[int], number: signal.Signals, patience_s: float) -> list[int]:
    """Signal each process and wait until all are gone or patience ends; the handles of those that remain."""
    for handle in handles:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, number)
    alive = set(handles)
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN)
    deadline = time.monotonic() + patience_s
    while alive and (left := deadline - time.monotonic()) > 0:
        for handle, _ in poll.poll(left * 1000):
            poll.unregister(handle)
            alive.discard(handle)
    return list(alive)
