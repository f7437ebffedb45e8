"""From a gRPC Request to the HTTP request it stands for: what may pass, and under which key. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import grpc

METHODS = ("GET", "POST", "DELETE")

_PATH = re.compile(r"/v1/[A-Za-z0-9/_.-]+")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_AUTHORIZATION = "authorization"

# Of one connection only (RFC 9110 §7.6.1), or set anew by our own HTTP client.
HOP_BY_HOP = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade", "host", "content-length", "expect",
    }
)  # fmt: skip
# What only we or a trusted proxy may say of a client.
_CLAIMS = ("x-assistant-", "x-forwarded-")


class Refused(Exception):
    """The call ends with this gRPC status; the message is one sentence for the caller."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """What is sent to the gateway. Header names are lower-case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def http_request(
    path: str, method: str, body: bytes, headers: Mapping[str, str], metadata: Iterable[tuple[str, str | bytes]]
) -> HttpRequest:
    """The HTTP request that a Request and its call's metadata stand for; Refused where it may not pass."""
    if not _PATH.fullmatch(path) or ".." in path:
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            "The path must start with /v1/ and hold only letters, digits and / _ . - without '..'; it has no query.",
        )
    if method.upper() not in METHODS:
        raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"The method must be one of {', '.join(METHODS)}.")
    key = one_key([*_keys_in(headers.items()), *_keys_in(metadata)])
    return HttpRequest(method.upper(), path, _passing(headers, key), body)


def key_of(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The authorization of a call's metadata, None without one; Refused where there are several."""
    return one_key(_keys_in(metadata))


def one_key(keys: list[str]) -> str | None:
    """The only key given; two different ones would leave open on whose account the call runs."""
    if len(set(keys)) > 1:
        raise Refused(
            grpc.StatusCode.UNAUTHENTICATED,
            "Two different API keys were given; send one, in the request's authorization header or in the call's metadata.",
        )
    return keys[0] if keys else None


def _keys_in(pairs: Iterable[tuple[str, str | bytes]]) -> list[str]:
    return [_text(value) for name, value in pairs if name.lower() == _AUTHORIZATION]


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


def _passing(headers: Mapping[str, str], key: str | None) -> dict[str, str]:
    """The headers that go on to the gateway, with the one key."""
    given = {name.lower(): value for name, value in headers.items()}
    named = {name.strip().lower() for name in given.get("connection", "").split(",")} - {""}
    dropped = HOP_BY_HOP | named | {"forwarded", _AUTHORIZATION}
    passing = {name: value for name, value in given.items() if name not in dropped and not name.startswith(_CLAIMS)}
    if key is not None:
        passing[_AUTHORIZATION] = key
    for name, value in passing.items():
        if not _HEADER_NAME.fullmatch(name) or _CONTROL.search(value):
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"The header {name[:80]!r} is not a valid HTTP header.")
    return passing


def answer_headers(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """An HTTP answer's headers as a Response carries them: lower-case, repeated ones joined, none of the connection's."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in raw:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        if name not in HOP_BY_HOP:
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers
