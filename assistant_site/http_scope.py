"""The ASGI scope of one HTTP request from its parsed head. Pure."""

from __future__ import annotations

from urllib.parse import unquote

import httptools

from assistant_site.asgi_types import Scope

Headers = list[tuple[bytes, bytes]]


def http_scope(method: str, version: str, target: bytes, headers: Headers) -> Scope | None:
    """The scope, with client and server still to be filled in; None where the target is no path."""
    if not target.startswith(b"/") and target != b"*":
        target = _path_of(target)
    if not target or not target.isascii():
        return None
    raw_path, _, query = target.partition(b"?")
    path = raw_path.decode("ascii")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": version,
        "method": method,
        "scheme": "http",
        "path": unquote(path) if "%" in path else path,
        "raw_path": raw_path,
        "query_string": query,
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
    }


def believe_forwarded(scope: Scope) -> None:
    """Take client and scheme from X-Forwarded-*: right only where nobody but our own gateway can connect."""
    found = {name: value.decode("latin-1") for name, value in scope["headers"] if name.startswith(b"x-forwarded-")}
    address = found.get(b"x-forwarded-for", "").partition(",")[0].strip()
    if address:
        port = found.get(b"x-forwarded-port", "")
        scope["client"] = (address, int(port) if port.isdigit() else 0)
        scope["scheme"] = found.get(b"x-forwarded-proto", scope["scheme"])


def _path_of(target: bytes) -> bytes:
    """Path and query of an absolute-form target, as proxies send; empty where there is none."""
    try:
        url = httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError:
        return b""
    path = url.path or b"/"
    return path + b"?" + url.query if url.query else path
