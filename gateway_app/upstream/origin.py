"""Where an upstream listens, and what its requests look like on the wire. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

Headers = Sequence[tuple[bytes, bytes]]

_BODILESS = frozenset((b"GET", b"HEAD", b"OPTIONS", b"DELETE", b"TRACE"))  # no Content-Length: 0 for these


@dataclass(frozen=True, slots=True)
class Origin:
    """One scheme, host and port; connections are shared by equal origins.

    server_hostname: the name the TLS certificate must carry; None to use the host.
    """

    host: str
    port: int
    tls: bool = False
    server_hostname: str | None = None
    host_header: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = self.port == (443 if self.tls else 80)
        object.__setattr__(self, "host_header", (host if usual else f"{host}:{self.port}").encode("ascii"))

    @classmethod
    def from_url(cls, url: str) -> tuple[Origin, str]:
        """The origin of an http or https address and its path without a slash at the end, "" for the root.

        Raises ValueError for any other address, for one with user information, a query or a fragment.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("an upstream address must begin with http:// or https:// and name a host")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("an upstream address must hold neither credentials nor a query")
        tls = parts.scheme == "https"
        host = parts.hostname
        if not host.isascii():
            host = host.encode("idna").decode("ascii")
        return cls(host, parts.port or (443 if tls else 80), tls, host if tls else None), parts.path.rstrip("/")


def request_head(origin: Origin, method: bytes, target: bytes, headers: Headers, length: int) -> bytes:
    """The head of an HTTP/1.1 request, ours being Host, Connection and Content-Length; the caller's names none of these.

    Raises ValueError where the method, the target or a header would say more than one line or word: such bytes would let
    one request become two.
    """
    lines = [b"%b %b HTTP/1.1\r\nhost: %b\r\nconnection: keep-alive" % (method, target, origin.host_header)]
    lines += [b"%b: %b" % header for header in headers]
    if length or method not in _BODILESS:
        lines.append(b"content-length: %d" % length)
    head = b"\r\n".join(lines)
    breaks = len(lines) + 1
    if head.count(b"\n") != breaks or head.count(b"\r") != breaks or b"\0" in head or b" " in target or b" " in method:
        raise ValueError("the request holds a line break or a blank where none may be")
    return head + b"\r\n\r\n"
