"""The usage spool: one line when a request is admitted, one when it ends (models_app/contracts/spool.py says how files work).

A write is one `os.write` to a local file, microseconds long, so it happens on the event loop. When the disk fails, requests go
on: the loss is logged once, counted, and the next request tries again.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from gateway_app.keys import KeyRecord
from gateway_app.sse import Usage
from models_app.contracts.spool import CLOSED_SUFFIX, MAX_FILE_AGE_S, MAX_FILE_BYTES, OPEN_SUFFIX, End, file_name

logger = logging.getLogger(__name__)

_text = lru_cache(maxsize=4096)(json.dumps)


@lru_cache(maxsize=4096)
def _who(user: int, key: int, user_name: str, public_id: str) -> str:
    return f'"user":{user},"key":{key},"user_name":{json.dumps(user_name)},"key_public_id":{json.dumps(public_id)}'


@dataclass(slots=True)
class Outcome:
    """How a request ended. Times in milliseconds; None: unknown, or it never came to that."""

    backend: str = ""
    status: int = 0
    end: End = "error"
    error_code: str = ""
    usage: Usage | None = None
    queue_ms: float = 0.0
    first_ms: float | None = None
    total_ms: float = 0.0


class Meter:
    """Writes the spool of one gateway. Used from one event loop."""

    def __init__(self, folder: Path, gateway: str, *, max_bytes: int = MAX_FILE_BYTES, max_age_s: float = MAX_FILE_AGE_S) -> None:
        self._folder = folder
        self._gateway = gateway
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._open: dict[str, bytes] = {}  # start lines of requests that run
        self._fd: int | None = None
        self._size = 0
        self._fresh = False  # whether the file has lines other than repeated starts
        self._sequence = 0
        self._timer: asyncio.TimerHandle | None = None
        self._failing = False
        self.lost = 0  # lines the disk did not take

    def start(self, request_id: str, at: float, key: KeyRecord, model: str, endpoint: str, stream: bool) -> str:
        """A request was admitted. Gives what `end` needs."""
        fields = (
            f'"id":"{request_id}","at":{at:.6f},{_who(key.user_id, key.id, key.user_name, key.public_id)},'
            f'"model":{_text(model)},"endpoint":"{endpoint}","stream":{"true" if stream else "false"},"gateway":"{self._gateway}"'
        )
        line = f'{{"t":"start",{fields}}}\n'.encode()
        self._write(line)
        self._open[request_id] = line
        return fields

    def end(self, request_id: str, fields: str, outcome: Outcome) -> None:
        """The request is over; `fields` is what `start` gave."""
        usage = outcome.usage
        prompt, cached, completion = (
            (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) if usage else (None, None, None)
        )
        first = "null" if outcome.first_ms is None else f"{outcome.first_ms:.3f}"
        line = (
            f'{{"t":"end",{fields},"backend":{_text(outcome.backend)},"status":{outcome.status},"end":"{outcome.end}",'
            f'"error_code":{_text(outcome.error_code)},"prompt":{_number(prompt)},"cached":{_number(cached)},'
            f'"completion":{_number(completion)},"queue_ms":{outcome.queue_ms:.3f},"first_ms":{first},'
            f'"total_ms":{outcome.total_ms:.3f}}}\n'
        )
        self._open.pop(request_id, None)
        self._write(line.encode())

    def close(self) -> None:
        """Close the file; starts without an end stay for the ingester to report as lost."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._close_file()

    def _write(self, line: bytes) -> None:
        try:
            if self._fd is None or self._size + len(line) > self._max_bytes:
                self._next_file()
            self._append(line)
        except OSError as error:
            self._failed(error)
            return
        if not self._fresh:
            self._fresh = True
            self._timer = asyncio.get_running_loop().call_later(self._max_age_s, self._grown_old)
        if self._failing:
            self._failing = False
            logger.info("The usage spool can be written again; %d lines were lost.", self.lost)

    def _append(self, line: bytes) -> None:
        assert self._fd is not None
        written = os.write(self._fd, line)
        if written < len(line):  # the disk filled up in the middle of it: leave whole lines only
            os.ftruncate(self._fd, self._size)
            raise OSError("no space for a whole line")
        self._size += written

    def _failed(self, error: OSError) -> None:
        self.lost += 1
        if not self._failing:
            self._failing = True
            logger.error("The usage spool in %s cannot be written; usage is lost until it can: %s", self._folder, error)

    def _grown_old(self) -> None:
        self._timer = None
        try:
            if self._open:
                self._next_file()
            else:
                self._close_file()
        except OSError as error:
            self._failed(error)
        self._fresh = False

    def _next_file(self) -> None:
        """Open the next file, the starts of what still runs at its top, then close the old one: nothing is ever in neither."""
        sequence = self._sequence + 1
        path = self._folder / file_name(self._gateway, sequence, OPEN_SUFFIX)
        draft = path.with_name(f".{path.name}")
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            head = b"".join(self._open.values())
            if head and os.write(fd, head) < len(head):
                raise OSError("no space for the running requests")
            draft.rename(path)
        except OSError:
            os.close(fd)
            draft.unlink(missing_ok=True)
            raise
        old, old_sequence = self._fd, self._sequence
        self._fd, self._size, self._sequence, self._fresh = fd, len(head), sequence, False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if old is not None:
            self._finish_file(old, old_sequence)

    def _close_file(self) -> None:
        fd, self._fd, self._fresh = self._fd, None, False
        if fd is not None:
            self._finish_file(fd, self._sequence)

    def _finish_file(self, fd: int, sequence: int) -> None:
        """Rename before closing: while it is locked nobody takes it for a dead gateway's."""
        try:
            path = self._folder / file_name(self._gateway, sequence, OPEN_SUFFIX)
            path.rename(path.with_suffix(CLOSED_SUFFIX))
        finally:
            os.close(fd)


def _number(value: int | None) -> str:
    return "null" if value is None else str(value)
