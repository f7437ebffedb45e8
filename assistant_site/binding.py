"""Takes the address before anything else is started, so that a taken one is named at once."""

from __future__ import annotations

import errno
import ipaddress
import socket
from pathlib import Path

import psutil

from assistant_site import env


class AddressInUse(Exception):
    """Somebody else listens there; str() is a sentence with the remedy."""


class Listener:
    """A bound socket that does not listen yet, the name to show for it, and its file where it has one.

    Two processes may bind one address with SO_REUSEADDR until one of them listens: the other one's listen() then fails with
    EADDRINUSE, for which in_use() has the sentence.
    """

    def __init__(self, bound: socket.socket, name: str, setting: str, path: Path | None = None) -> None:
        self.socket = bound
        self.name = name
        self.path = path
        self._setting = setting
        self._inode = path.stat().st_ino if path is not None else 0

    def in_use(self) -> AddressInUse:
        return AddressInUse(_in_use(self.name, self.socket.getsockname()[1], self._setting))

    def close(self) -> None:
        """Close the socket and remove its file, unless a successor has bound the same path meanwhile."""
        self.socket.close()
        if self.path is not None and self.path.exists() and self.path.stat().st_ino == self._inode:
            self.path.unlink(missing_ok=True)


def bind_tcp(host: str, port: int, setting: str) -> Listener:
    """Raises AddressInUse, whose message names the holder and the setting; OSError for an address that is not this machine's."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(_in_use(_shown(host, port), port, setting)) from error
        raise
    return Listener(bound, _shown(host, bound.getsockname()[1]), setting)


def bind_unix(path: Path) -> Listener:
    """A socket for this user alone in a folder for this user alone. A dead process's socket file is replaced."""
    env.private_folder(path.parent)
    if _answers(path):
        raise AddressInUse(f"Socket {path} is in use by another process. Stop it first.")
    path.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.bind(str(path))
    except OSError:
        bound.close()
        raise
    path.chmod(0o700)
    return Listener(bound, f"unix:{path}", "ASSISTANT_HOME", path)


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _in_use(name: str, port: int, setting: str) -> str:
    holder = _holder(port)
    by = f" (pid {holder[0]} {holder[1]})" if holder else ""
    return f"Address {name} is in use{by}. Stop it or set {setting}."


def _holder(port: int) -> tuple[int, str] | None:
    """(pid, name) of who listens on the port, where we may know."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port and connection.pid:
                return connection.pid, psutil.Process(connection.pid).name()
    except psutil.Error:
        pass
    return None
