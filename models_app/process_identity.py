"""Who a process is: (boot id, pid, start ticks). A pid alone may be somebody else's by now.

Boot id and start ticks come from /proc: psutil's creation time moves when the clock is set. A zombie is dead.
"""

from __future__ import annotations

import os
import select
import signal
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# Fields of /proc/<pid>/stat, counted after the command name, which may itself hold blanks and brackets.
_STATE = 0
_START_TICKS = 19
_DEAD_STATES = frozenset({"Z", "X", "x"})


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process of one boot of this machine."""

    boot_id: str
    pid: int
    start_ticks: int


@lru_cache(maxsize=1)
def boot_id() -> str:
    """The kernel's id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_ticks(pid: int) -> int | None:
    """Start time in clock ticks since boot, None where no living process has this pid."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[_STATE] in _DEAD_STATES else int(fields[_START_TICKS])


def identify(pid: int) -> ProcessIdentity | None:
    """The living process that has this pid now, None where there is none."""
    ticks = _start_ticks(pid)
    return None if ticks is None else ProcessIdentity(boot_id(), pid, ticks)


def alive(identity: ProcessIdentity) -> bool:
    """Whether exactly this process still runs."""
    return identity.boot_id == boot_id() and _start_ticks(identity.pid) == identity.start_ticks


def _open(identity: ProcessIdentity) -> int | None:
    """A pidfd of exactly this process, None where it is gone. Checked after opening: from then on the pid cannot be reused."""
    try:
        descriptor = os.pidfd_open(identity.pid)
    except (ProcessLookupError, OverflowError, ValueError):
        return None
    if alive(identity):
        return descriptor
    os.close(descriptor)
    return None


def send(identity: ProcessIdentity, number: signal.Signals) -> bool:
    """Signal exactly this process; False where it is gone. PermissionError where it is not ours."""
    descriptor = _open(identity)
    if descriptor is None:
        return False
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def wait_gone(identity: ProcessIdentity, timeout_s: float) -> bool:
    """Wait until the process has ended; False where it still runs after timeout_s."""
    descriptor = _open(identity)
    if descriptor is None:
        return True
    try:
        waiter = select.poll()
        waiter.register(descriptor, select.POLLIN)
        waiter.poll(max(0, int(timeout_s * 1000)))
    finally:
        os.close(descriptor)
    return not alive(identity)
