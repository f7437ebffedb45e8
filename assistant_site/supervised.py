"""One supervised program: what it is, and the life of its process.

Each process leads a session of its own (a terminal's Ctrl-C reaches the supervisor alone), is told by the kernel when the
supervisor dies, and takes its group with it when it ends. Its end is learnt from a pidfd: waiting for the end of its pipe
would last as long as any grandchild holds the pipe.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from assistant_site import child_exec
from assistant_site.program_log import ProgramLog

BACKOFF_FIRST_S = 0.5
BACKOFF_MOST_S = 30.0
BACKOFF_SPREAD = 0.1
STEADY_S = 30.0  # a process that lived this long starts the back-off anew
HURRY_S = 0.5  # between TERM and KILL where the user is in a hurry
CHUNK = 64 * 1024  # bytes per read
LAST_READ = 16  # chunks read of a process that has ended; a grandchild could write for ever

# Given the pid: an address may be answered by somebody else's process.
Probe = Callable[[int], Awaitable[bool]]


@dataclass(frozen=True)
class Program:
    """What to run. Lower levels are ready before higher ones start; lower stop orders have ended before higher ones stop."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path | None = None
    level: int = 0
    stop_order: int = 0
    ready: Probe | None = None  # None: ready as soon as it runs
    start_timeout_s: float = 120.0
    stop_timeout_s: float = 5.0
    death_signal: signal.Signals = signal.SIGTERM  # what it gets when the supervisor is killed
    once: bool = False  # it ends by itself and is not started again
    hint: str = ""  # what to do if it does not start


def backoff_s(failures: int, spread: float) -> float:
    """Seconds until the next start after so many failures in a row (1, 2, …); spread from -1 to 1."""
    plain = min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 16))
    return plain * (1 + BACKOFF_SPREAD * spread)


def describe_exit(code: int) -> str:
    """Popen's return code in words."""
    if code >= 0:
        return f"exited with code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    advice = "; this processor lacks instructions it needs" if -code == signal.SIGILL else ""
    return f"was ended by {name}{advice}"


def _call_in_loop(loop: asyncio.AbstractEventLoop, callback: Callable[[int], None], pipe: int) -> None:
    """From another thread, which may be later than the loop's end."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, pipe)


class Child:
    """Runs a program until told to stop. To be used on the event loop of the main thread (death signals follow threads)."""

    def __init__(self, program: Program, log: ProgramLog, exited: Callable[[Child], None]) -> None:
        self.program = program
        self.log = log
        self.failures = 0  # ends in a row, unless wanted
        self.last_exit = ""
        self.code: int | None = None
        self._exited = exited
        self._loop = asyncio.get_running_loop()
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._pipe = -1
        self._started_at = 0.0
        self._restart: asyncio.TimerHandle | None = None
        self._stopping = False
        self._over = asyncio.Event()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Spawn the process and watch it."""
        self._restart = None
        self._over.clear()
        self._pipe, theirs = os.pipe()
        os.set_blocking(self._pipe, False)
        argv = [sys.executable, "-I", "-S", child_exec.__file__, str(os.getpid()), str(int(self.program.death_signal))]
        self._started_at = time.monotonic()
        try:
            self._process = subprocess.Popen(
                [*argv, *self.program.argv],
                env=dict(self.program.env),
                cwd=self.program.cwd,
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,
            )
        except OSError as error:  # no memory or no process left just now
            os.close(self._pipe)
            self.last_exit = f"could not be started ({error.strerror})"
            self._start_again()
            return
        finally:
            os.close(theirs)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._ended)
        self._loop.add_reader(self._pipe, self._readable)

    async def stop(self, hurry: asyncio.Event) -> None:
        """TERM, and KILL of the whole group when the time is up or soon after `hurry` is set; returns when it has ended."""
        self._stopping = True
        if self._restart:
            self._restart.cancel()
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
        over = asyncio.ensure_future(self._over.wait())
        hurried = asyncio.ensure_future(hurry.wait())
        try:
            await asyncio.wait({over, hurried}, timeout=self.program.stop_timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if hurry.is_set():
                await asyncio.wait({over}, timeout=HURRY_S)
            if self._process is not None:
                self.log.say("did not stop in time and is killed" if not hurry.is_set() else "is killed")
                self._kill_group()
                await over
        finally:
            over.cancel()
            hurried.cancel()

    async def over(self) -> int:
        """The exit code of a program that runs once."""
        await self._over.wait()
        return self.code or 0

    def _readable(self) -> None:
        if not self._read():
            self._loop.remove_reader(self._pipe)
        elif self.log.full:
            self._loop.remove_reader(self._pipe)
            self.log.when_room(partial(_call_in_loop, self._loop, self._resume, self._pipe))

    def _resume(self, pipe: int) -> None:
        if self._pipe == pipe:
            self._loop.add_reader(pipe, self._readable)

    def _read(self) -> bool:
        """Pass on what is there; False at the end of the pipe or when there is nothing now."""
        try:
            data = os.read(self._pipe, CHUNK)
        except BlockingIOError:
            return False
        self.log.feed(data)
        return bool(data)

    def _kill_group(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _ended(self) -> None:
        """The process is a zombie: until it is reaped, its group's number cannot be another's."""
        assert self._process is not None
        self._kill_group()
        self.code = self._process.wait()
        for _ in range(LAST_READ):
            if not self._read():
                break
        self.log.finish()
        for descriptor in (self._pidfd, self._pipe):
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
        self._process, self._pipe, self._pidfd = None, -1, -1
        self.last_exit = describe_exit(self.code)
        if not self._stopping and not self.program.once:
            self._start_again()
        self._over.set()
        self._exited(self)

    def _start_again(self) -> None:
        if time.monotonic() - self._started_at >= STEADY_S:
            self.failures = 0
        self.failures += 1
        delay = backoff_s(self.failures, random.uniform(-1, 1))  # noqa: S311  # spreads restarts; no secret
        self.log.say(f"{self.last_exit}; starts again in {delay:.1f} s")
        self._restart = self._loop.call_later(delay, self.start)
