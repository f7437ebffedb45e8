"""Runs a set of programs: levels with readiness, restart with back-off, an ordered stop.

Process life cycles are this project's trade, so this is ours: general supervisors lose children when they are killed,
stop one program at a time, or drop output (supervised.py and previous_life.py say what is done about each).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from assistant_site.program_log import Output, ProgramLog
from assistant_site.supervised import Child, Program

PR_SET_CHILD_SUBREAPER = 36
FAILURES_AT_START = 3  # ends in a row that make a start hopeless
PROBE_PERIOD_S = 0.2
REAP_PERIOD_S = 1.0

T = TypeVar("T")


class StartFailed(Exception):
    """A program never became ready; str() says which, why, what it printed last and what to do."""


@dataclass(frozen=True)
class StopStep:
    """Something to do between two stop orders. run() is given the hurry as True, and runs in a thread."""

    name: str
    stop_order: int
    run: Callable[[bool], None]
    timeout_s: float


class Supervisor:
    """One life: start() once, stop() once. Lives on the event loop of the main thread."""

    def __init__(
        self, programs: Sequence[Program], *, output: Output, log_folder: Path | None = None, steps: Sequence[StopStep] = ()
    ) -> None:
        self._programs = programs
        self._output = output
        self._folder = log_folder
        self._steps = steps
        self._width = max([len(program.name) for program in programs], default=2)
        self._children: dict[str, Child] = {}
        self._log = self._make_log("up")
        self._hurry = asyncio.Event()
        self._hopeless: asyncio.Future[Child] = asyncio.get_running_loop().create_future()
        self._reaper: asyncio.Task[None] | None = None
        self.clean = True  # False once a part of the stop went wrong

    def say(self, sentence: str) -> None:
        """Print a line among the programs' lines."""
        self._log.say(sentence)

    def pids(self) -> dict[str, int]:
        """Of the programs that run now, by name."""
        return {name: child.pid for name, child in self._children.items() if child.pid}

    async def start(self) -> None:
        """Start level by level. Raises StartFailed; what runs then is the caller's to stop()."""
        become_subreaper()
        self._reaper = asyncio.create_task(_reap_adopted(self.pids))
        for level in sorted({program.level for program in self._programs}):
            children = [self._spawn(program) for program in self._programs if program.level == level]
            for child in children:
                await self.watched(self._until_ready(child))

    async def watched(self, work: Coroutine[Any, Any, T]) -> T:
        """Await the work; StartFailed if meanwhile a program turns out not to start at all."""
        task = asyncio.create_task(work)
        try:
            waited: list[asyncio.Future[Any]] = [task, self._hopeless]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if self._hopeless.done():
                child = self._hopeless.result()
                raise _start_failed(child, f"{child.last_exit} {child.failures} times in a row")
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def run_once(self, program: Program) -> int:
        """Run a program to its end: its exit code. stop() ends it like any other."""
        return await self._spawn(program).over()

    def hurry(self) -> None:
        """Give no more time to anything that is being stopped."""
        self._hurry.set()

    async def stop(self) -> None:
        """End everything by stop order, in parallel where that is equal."""
        orders = {child.program.stop_order for child in self._children.values()} | {step.stop_order for step in self._steps}
        for order in sorted(orders):
            children = [child for child in self._children.values() if child.program.stop_order == order]
            await asyncio.gather(*(child.stop(self._hurry) for child in children))
            for step in self._steps:
                if step.stop_order == order:
                    await self._run_step(step)
        if self._reaper:
            self._reaper.cancel()
            with suppress(asyncio.CancelledError):
                await self._reaper
        for child in self._children.values():
            child.log.close()
        self._log.close()

    def _make_log(self, name: str) -> ProgramLog:
        return ProgramLog(name, self._output, width=self._width, colour=len(self._children), folder=self._folder)

    def _spawn(self, program: Program) -> Child:
        child = Child(program, self._make_log(program.name), self._exited)
        self._children[program.name] = child
        child.start()
        return child

    def _exited(self, child: Child) -> None:
        if child.failures >= FAILURES_AT_START and not self._hopeless.done():
            self._hopeless.set_result(child)

    async def _until_ready(self, child: Child) -> None:
        if child.program.ready is None:
            return
        try:
            async with asyncio.timeout(child.program.start_timeout_s):
                while child.pid is None or not await child.program.ready(child.pid):  # noqa: ASYNC110  # nobody sets an event
                    await asyncio.sleep(PROBE_PERIOD_S)
        except TimeoutError:
            raise _start_failed(child, f"was not ready after {child.program.start_timeout_s:.0f} s") from None

    async def _run_step(self, step: StopStep) -> None:
        """A daemon thread: a step that hangs may delay the end of `up` by its time-out and no more."""
        done = asyncio.get_running_loop().create_future()
        thread = _StepThread(step, self._hurry.is_set(), done)
        thread.start()
        try:
            error = await asyncio.wait_for(done, step.timeout_s)
        except TimeoutError:
            error = f"not done after {step.timeout_s:.0f} s"
        if error:
            self.clean = False
            self.say(f"{step.name}: {error}")


class _StepThread(threading.Thread):
    """Runs a step and sets the future to what went wrong, or None."""

    def __init__(self, step: StopStep, hurry: bool, done: asyncio.Future[str | None]) -> None:
        super().__init__(name=step.name, daemon=True)
        self._step = step
        self._hurry = hurry
        self._done = done

    def run(self) -> None:
        error: str | None = None
        try:
            self._step.run(self._hurry)
        except Exception as failure:  # noqa: BLE001  # the boundary of `up`: nothing may keep it from stopping the rest
            error = f"{type(failure).__name__}: {failure}"
        with suppress(RuntimeError):  # the loop has given up on us and closed
            self._done.get_loop().call_soon_threadsafe(_settle, self._done, error)


def _settle(done: asyncio.Future[str | None], error: str | None) -> None:
    if not done.done():
        done.set_result(error)


def _start_failed(child: Child, reason: str) -> StartFailed:
    lines = "\n".join(f"    {line}" for line in child.log.last_lines)
    hint = f"\n{child.program.hint}" if child.program.hint else ""
    return StartFailed(f"{child.program.name} {reason}. Its last lines:\n{lines}{hint}")


def become_subreaper() -> None:
    """Orphans below us become our children instead of pid 1's, so that they can be found and reaped."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


async def _reap_adopted(ours: Callable[[], dict[str, int]]) -> None:
    """Reap orphans that became our children. A zombie seen in two periods is nobody else's to wait for."""
    seen = 0
    while True:
        zombie = _first_zombie()
        while zombie and zombie == seen and zombie not in ours().values():
            os.waitpid(zombie, os.WNOHANG)  # noqa: ASYNC222  # it is a zombie already
            zombie = _first_zombie()
        seen = zombie
        await asyncio.sleep(REAP_PERIOD_S)


def _first_zombie() -> int:
    """The pid of a child that could be reaped now, left as it is; 0 where there is none."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    return found.si_pid if found else 0
