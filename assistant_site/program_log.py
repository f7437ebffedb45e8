"""What programs print: whole lines, prefixed, to the terminal and to a size-capped file of each program; none is lost.

Bounds: a line longer than MAX_LINE comes in pieces; when OUTPUT_LIMIT bytes wait for a terminal that takes nothing, the
programs are not read any more, so they wait; a terminal that is gone is written to no more, the files go on.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

MAX_LINE = 64 * 1024  # bytes
OUTPUT_LIMIT = 1024 * 1024  # bytes
FILE_LIMIT = 5 * 1024 * 1024  # bytes of <name>.log before it becomes <name>.log.1
LAST_LINES = 20
COLOURS = (36, 33, 32, 35, 34, 96, 93, 92)  # ANSI foregrounds


class LineBuffer:
    """Bytes in, whole lines out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are complete now, without their ends."""
        *lines, rest = (self._rest + data).split(b"\n")
        while len(rest) > MAX_LINE:
            lines.append(rest[:MAX_LINE])
            rest = rest[MAX_LINE:]
        self._rest = rest
        return [line.removesuffix(b"\r") for line in lines]

    def finish(self) -> list[bytes]:
        """What came after the last line end."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


class Output:
    """A file descriptor written by a thread of its own, so that a stopped terminal never stops the supervisor."""

    def __init__(self, descriptor: int, colour: bool = False) -> None:
        self.colour = colour
        self._descriptor = descriptor
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._closed = False
        self._room: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._pump, name="output", daemon=True)
        self._thread.start()

    @property
    def full(self) -> bool:
        return self._size > OUTPUT_LIMIT

    def write(self, data: bytes) -> None:
        """Queue whole lines."""
        with self._changed:
            self._waiting.append(data)
            self._size += len(data)
            self._changed.notify()

    def when_room(self, callback: Callable[[], None]) -> None:
        """Call back once, from the writing thread, when the queue is no longer full."""
        with self._changed:
            self._room.append(callback)
            self._changed.notify()

    def close(self, patience_s: float = 2.0) -> None:
        """Wait until everything is written, or patience ends."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(patience_s)

    def _pump(self) -> None:
        works = True
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._room or self._closed)
                if not self._waiting and not self._room:
                    return
                data = b"".join(self._waiting)
                self._waiting.clear()
            works = works and _write_all(self._descriptor, data)
            with self._changed:
                self._size -= len(data)
                room, self._room = ([], self._room) if self.full else (self._room, [])
            for callback in room:
                callback()


class CappedFile:
    """Appends to a 0600 file that is moved to <file>.1 when it passes the limit. A full disk loses lines, never the caller."""

    def __init__(self, path: Path, limit: int = FILE_LIMIT) -> None:
        self._path = path
        self._limit = limit
        self._descriptor: int | None = None
        self._size = 0

    def write(self, data: bytes) -> None:
        with suppress(OSError):
            if self._descriptor is None or self._size > self._limit:
                self._open()
            if self._descriptor is not None:
                self._size += os.write(self._descriptor, data)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> None:
        self.close()
        if self._path.exists() and self._path.stat().st_size > self._limit:
            self._path.replace(self._path.with_name(self._path.name + ".1"))
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._size = os.fstat(self._descriptor).st_size


class ProgramLog:
    """Where one program's output goes."""

    def __init__(self, name: str, output: Output, *, width: int, colour: int, folder: Path | None) -> None:
        label = f"{name:<{width}} | "
        self._prefix = (f"\x1b[{COLOURS[colour % len(COLOURS)]}m{label}\x1b[0m" if output.colour else label).encode()
        self._output = output
        self._file = CappedFile(folder / f"{name}.log") if folder else None
        self._lines = LineBuffer()
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)

    @property
    def full(self) -> bool:
        return self._output.full

    def when_room(self, callback: Callable[[], None]) -> None:
        self._output.when_room(callback)

    def feed(self, data: bytes) -> None:
        self._emit(self._lines.feed(data))

    def say(self, sentence: str) -> None:
        """A line of our own."""
        self._emit(sentence.encode().split(b"\n"))

    def finish(self) -> None:
        """The program has ended; what it left without a line end is a line."""
        self._emit(self._lines.finish())

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _emit(self, lines: list[bytes]) -> None:
        if not lines:
            return
        self._output.write(b"".join(self._prefix + line + b"\n" for line in lines))
        if self._file:
            self._file.write(b"\n".join(lines) + b"\n")
        self.last_lines.extend(line.decode(errors="replace") for line in lines[-LAST_LINES:])


def _write_all(descriptor: int, data: bytes) -> bool:
    """False where the reader is gone."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:  # somebody who shares the terminal made it non-blocking
            select.select([], [descriptor], [])
        except OSError:
            return False
    return True
