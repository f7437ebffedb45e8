"""Starts tests/fakes/served_app.py and talks raw HTTP to it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
READY_S = 20.0


class Served:
    """One process running the scripted application; `log` grows as it writes standard error."""

    def __init__(self, *arguments: str, break_pipes: bool = False) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.served_app", *arguments],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        self.port = 0
        self._news = threading.Condition()
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(break_pipes,), daemon=True)
        self._reader.start()
        assert self._ready.wait(READY_S), self.log

    def _read(self, stop_when_ready: bool) -> None:
        assert self.process.stderr is not None
        assert self.process.stdout is not None
        for line in self.process.stderr:
            with self._news:
                self.log.append(line)
                self._news.notify_all()
            if "Listening on" in line:
                found = re.search(r":(\d+)\s*$", line)
                self.port = int(found[1]) if found else 0
                self._ready.set()
                if stop_when_ready:
                    break
        self._ready.set()
        self.process.stderr.close()
        self.process.stdout.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def get(self, path: str) -> Any:
        """The JSON answer of one GET on a connection of its own."""
        with self.connect() as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n".encode())
            return json.loads(read_all(connection).partition(b"\r\n\r\n")[2])

    def await_log(self, text: str) -> None:
        with self._news:
            assert self._news.wait_for(lambda: any(text in line for line in self.log), READY_S), self.log

    def terminate(self) -> None:
        """Send TERM and return when it has arrived."""
        self.process.send_signal(signal.SIGTERM)
        self.await_log("SIGTERM received")

    def wait(self) -> int:
        code = self.process.wait(15)
        self._reader.join(5)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()


@contextmanager
def served(*arguments: str, break_pipes: bool = False) -> Iterator[Served]:
    process = Served(*arguments, break_pipes=break_pipes)
    try:
        yield process
    finally:
        process.close()


def read_all(connection: socket.socket) -> bytes:
    """Everything until the peer closes; a reset counts as the end of it."""
    data = bytearray()
    try:
        while piece := connection.recv(1 << 20):
            data += piece
    except ConnectionResetError:
        pass
    return bytes(data)


def read_until(connection: socket.socket, mark: bytes, count: int = 1) -> bytes:
    """What came until `mark` was there `count` times."""
    data = b""
    while data.count(mark) < count:
        piece = connection.recv(1 << 16)
        assert piece, f"closed after {data!r}"
        data += piece
    return data


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def json_of(answer: bytes) -> Any:
    return json.loads(answer.partition(b"\r\n\r\n")[2])
