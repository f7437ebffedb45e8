"""Bytes from an HTTP server: redirects, retries, resume by Range."""

from __future__ import annotations

import re
import time

import httpx

from models_app.downloads.progress import Phase
from models_app.downloads.sources import check_url
from models_app.downloads.target import Sink, WrongContent
from models_app.exceptions import DownloadError

FRUITLESS_TRIES = 5  # tries in a row that bring no new byte
LONGEST_PAUSE_S = 30.0
MAX_REDIRECTS = 10
TIMEOUT = httpx.Timeout(30.0, connect=10.0)  # seconds

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_TRY_LATER = {408, 425, 429, 500, 502, 503, 504}


class _TryAgain(Exception):
    """This answer brought nothing; the next one may. str() says why."""


def download(url: httpx.URL, sink: Sink, retry_pause_s: float) -> None:
    """Fill the sink. A result that was put together from several answers and is wrong is fetched once more, whole."""
    with httpx.Client(
        follow_redirects=True,
        max_redirects=MAX_REDIRECTS,
        timeout=TIMEOUT,
        event_hooks={"request": [lambda request: check_url(request.url)]},
    ) as client:
        _until_complete(client, url, sink, retry_pause_s)
        if sink.resumed and not sink.right():
            sink.restart()
            _until_complete(client, url, sink, retry_pause_s)


def _until_complete(client: httpx.Client, url: httpx.URL, sink: Sink, retry_pause_s: float) -> None:
    fruitless = 0
    while sink.done < sink.wanted.bytes:
        before = sink.done
        try:
            _one_answer(client, url, sink)
            reason = "the server ended its answer early"
        except httpx.TooManyRedirects as error:
            raise DownloadError(f"{url.host} redirects more than {MAX_REDIRECTS} times; check the address.") from error
        except (httpx.TransportError, _TryAgain) as error:
            reason = str(error) or type(error).__name__
        if sink.done >= sink.wanted.bytes:
            return
        fruitless = 0 if sink.done > before else fruitless + 1
        if fruitless >= FRUITLESS_TRIES:
            raise DownloadError(
                f"{sink.wanted.file} could not be fetched from {url.host}: {reason}; check the network, or try again later "
                "(what came is kept)."
            )
        time.sleep(min(retry_pause_s * 2**fruitless, LONGEST_PAUSE_S))


def _one_answer(client: httpx.Client, url: httpx.URL, sink: Sink) -> None:
    """Ask for what is missing and write what comes."""
    headers = {"accept-encoding": "identity"}
    if sink.done:
        headers["range"] = f"bytes={sink.done}-"
    with client.stream("GET", url, headers=headers) as response:
        _check_status(response, sink)
        for chunk in response.iter_raw():
            sink.write(chunk, Phase.DOWNLOADING)


def _check_status(response: httpx.Response, sink: Sink) -> None:
    """Make the sink stand where this answer starts; raise where it brings nothing useful."""
    host, status = response.url.host, response.status_code
    if status in _TRY_LATER:
        raise _TryAgain(f"it answered {status}")
    if status == httpx.codes.PARTIAL_CONTENT:
        _check_range(response, sink)
    elif status == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
        raise WrongContent(f"{host} has fewer bytes of {sink.wanted.file} than expected; check its source.")
    elif status == httpx.codes.OK:
        announced = response.headers.get("content-length", str(sink.wanted.bytes))
        if announced != str(sink.wanted.bytes):
            raise _wrong_length(response, sink, announced)
        sink.restart()  # this server sends it from the start
    elif status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise DownloadError(f"{host} refused {sink.wanted.file} ({status}): it wants a login or an accepted licence.")
    else:
        raise DownloadError(f"{host} answered {status} for {sink.wanted.file}; check its source.")


def _check_range(response: httpx.Response, sink: Sink) -> None:
    match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if match is None or int(match[1]) != sink.done:
        sink.restart()
        raise _TryAgain("it answered with another part than asked")
    if match[2] not in ("*", str(sink.wanted.bytes)):
        raise _wrong_length(response, sink, match[2])
    sink.resumed = True


def _wrong_length(response: httpx.Response, sink: Sink, announced: str) -> DownloadError:
    return DownloadError(
        f"{response.url.host} offers {announced} bytes for {sink.wanted.file}, not the expected {sink.wanted.bytes}; "
        "check its source."
    )
