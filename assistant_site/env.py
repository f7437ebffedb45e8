"""Typed reading of the environment, and the private folders and secrets of one installation.

Every helper raises ImproperlyConfigured naming the variable, what it holds and what it should hold.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import stat
from pathlib import Path

from django.core.exceptions import ImproperlyConfigured

# sun_path holds 108 bytes with its terminator; a socket path longer than this cannot be bound.
MAX_SOCKET_PATH = 107
LONGEST_SOCKET = "console.sock"


def text(name: str, default: str) -> str:
    """The variable, or the default where it is unset or empty."""
    return os.environ.get(name) or default


def integer(name: str, default: int, low: int, high: int) -> int:
    """A whole number from low to high."""
    raw = os.environ.get(name)
    if not raw:
        return default
    try:
        value = int(raw)
    except ValueError:
        raise ImproperlyConfigured(f"{name}={raw!r} is not a whole number.") from None
    if not low <= value <= high:
        raise ImproperlyConfigured(f"{name}={value} must lie between {low} and {high}.")
    return value


def boolean(name: str, default: bool) -> bool:
    """1, true, yes, on or 0, false, no, off."""
    raw = os.environ.get(name)
    if not raw:
        return default
    if raw.lower() in {"1", "true", "yes", "on"}:
        return True
    if raw.lower() in {"0", "false", "no", "off"}:
        return False
    raise ImproperlyConfigured(f"{name}={raw!r} must be 1 or 0.")


def choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    """One of the allowed words."""
    value = text(name, default)
    if value not in allowed:
        raise ImproperlyConfigured(f"{name}={value!r} must be one of: {', '.join(allowed)}.")
    return value


def words(name: str) -> list[str]:
    """A comma-separated list, blanks dropped; empty where unset."""
    return [word.strip() for word in os.environ.get(name, "").split(",") if word.strip()]


def paths(name: str, default: Path) -> list[Path]:
    """Folders separated by ':', resolved; the default alone where unset."""
    raw = [Path(part).expanduser().resolve() for part in os.environ.get(name, "").split(os.pathsep) if part]
    return raw or [default]


def address(name: str, default: str) -> tuple[str, int]:
    """host:port, with IPv6 hosts in brackets, as (host, port)."""
    raw = text(name, default)
    host, colon, port = raw.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 65536 or not host:
        raise ImproperlyConfigured(f"{name}={raw!r} must look like 127.0.0.1:8080 or [::1]:8080.")
    return host.strip("[]"), int(port)


def redis_url(name: str) -> str:
    """The address of a Valkey or Redis; empty where unset. What it is set to may hold a password, so it is not repeated."""
    raw = text(name, "")
    scheme, there, _ = raw.partition("://")
    if raw and (scheme not in {"redis", "rediss", "unix"} or not there):
        raise ImproperlyConfigured(f"{name} must look like redis://:password@host:6379/0, rediss://… or unix:///path.")
    return raw


def node_name(home: Path) -> str:
    """This machine's name among the nodes: ASSISTANT_NODE, else the host name of the first start, cut to what a queue name takes.

    The host name is kept in home/node_name: a new container on an old home has another one, and its instances would be taken
    for another machine's, which nobody may give up.
    """
    raw = os.environ.get("ASSISTANT_NODE") or _kept_host_name(home / "node_name")
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in raw)[:63]


def _kept_host_name(file: Path) -> str:
    host = socket.gethostname() or "local"
    if not file.exists():
        write_secret(file, host)  # no secret, but whole and ours
    return file.read_text().strip() or host


def private_folder(folder: Path) -> Path:
    """Make the folder with mode 0700 and return it; refuse one that somebody else owns."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise ImproperlyConfigured(f"{folder} belongs to user id {status.st_uid}, not to us; choose another ASSISTANT_HOME.")
    if stat.S_IMODE(status.st_mode) & 0o077:
        folder.chmod(0o700)
    return folder


def run_folder(home: Path) -> Path:
    """The folder of sockets and locks: home/run, or a short private one where the path is too long for a socket."""
    folder = home / "run"
    if len(os.fsencode(folder / LONGEST_SOCKET)) <= MAX_SOCKET_PATH:
        return private_folder(folder)
    digest = hashlib.sha256(str(home).encode()).hexdigest()[:12]
    short = Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp")  # noqa: S108  # private_folder refuses a planted folder
    return private_folder(short / f"assistant-{os.getuid()}-{digest}")


def secret(home: Path, name: str) -> str:
    """The secret kept in home/secrets/<name> (0600), made of 256 random bits on first use.

    Two processes may ask at once: the file is linked into place whole, so both read the same one.
    """
    file = private_folder(home / "secrets") / name
    if not file.exists():
        write_secret(file, secrets.token_urlsafe(32))
    value = file.read_text().strip()
    if not value:
        raise ImproperlyConfigured(f"{file} is empty; restore it from a backup or remove it to make a new secret.")
    return value


def write_secret(file: Path, value: str) -> bool:
    """Write a 0600 file unless it exists; True if this call made it."""
    draft = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as handle:
            handle.write(value + "\n")
        os.link(draft, file)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True
