"""How large a source is, for a file whose checksum is known but whose size is not."""

from __future__ import annotations

import httpx

from models_app.downloads.sources import LocalSource, WebSource, check_url, parse_source
from models_app.downloads.web import MAX_REDIRECTS, TIMEOUT
from models_app.exceptions import DownloadError

LARGEST = 1 << 33  # bytes; a source that announces more is not believed


def size_of(source: str) -> int:
    """Bytes of a file on the web or on this machine, without fetching it. Raises DownloadError."""
    parsed = parse_source(source)
    if isinstance(parsed, WebSource):
        return _announced(parsed.url)
    if isinstance(parsed, LocalSource):
        try:
            return parsed.path.stat().st_size
        except OSError as error:
            raise DownloadError(f"Cannot read {parsed.path}: {error.strerror}; check the path and its permissions.") from error
    raise DownloadError(f"The size of {source} is not known before it is fetched; use an https:// address or a path.")


def _announced(url: httpx.URL) -> int:
    """The length that a GET announces: not every server answers HEAD as it would GET."""
    hooks = {"request": [lambda request: check_url(request.url)]}
    client = httpx.Client(follow_redirects=True, max_redirects=MAX_REDIRECTS, timeout=TIMEOUT, event_hooks=hooks)
    try:
        with client, client.stream("GET", url, headers={"accept-encoding": "identity"}) as response:
            host, status, length = response.url.host, response.status_code, response.headers.get("content-length", "")
    except (httpx.TransportError, httpx.TooManyRedirects) as error:
        said = str(error) or type(error).__name__
        raise DownloadError(f"{url.host} cannot be asked for the file ({said}); check the network and the address.") from error
    if status != httpx.codes.OK:
        raise DownloadError(f"{host} answered {status}; check the address.")
    if not length.isdecimal() or not 0 < int(length) <= LARGEST:
        raise DownloadError(f"{host} does not say how large the file is; fetch it by hand.")
    return int(length)
