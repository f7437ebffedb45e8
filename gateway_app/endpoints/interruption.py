"""Ending a request from outside: its client has gone, or reads too slowly. By cancelling the one task that serves it."""

from __future__ import annotations

import asyncio
import enum
from typing import Any

from gateway_app.endpoints.http import Receive


class Reason(enum.Enum):
    """Why the task was cancelled, for the handler of CancelledError."""

    CLIENT_GONE = enum.auto()
    SLOW_READER = enum.auto()


class Interruption:
    """Watches one request's client and cancels the current task when it goes.

    Watching costs a task, so it begins only after `delay_s`: most answers are there by then.
    """

    __slots__ = ("_receive", "_task", "_timer", "_watcher", "reason")

    def __init__(self, receive: Receive, delay_s: float) -> None:
        task = asyncio.current_task()
        assert task is not None, "a request is served by a task"
        self._task: asyncio.Task[Any] = task
        self._receive = receive
        self._watcher: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.reason: Reason | None = None
        if delay_s > 0:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._begin)
        else:
            self._begin()

    def interrupt(self, reason: Reason) -> None:
        """End the request for this reason; the first one counts."""
        if self.reason is None:
            self.reason = reason
            self._task.cancel()

    def close(self) -> None:
        """Stop watching: before the last message is sent, since servers report a finished request as disconnected."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None

    def _begin(self) -> None:
        self._timer = None
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.interrupt(Reason.CLIENT_GONE)
