"""Browsers that reload a page of the admin again and again, as load beside a measurement."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from tests.bench.load import HOST, LoadFailed

BROWSERS: Final = 2
PATIENCE_S: Final = 30.0  # for one page
PAGE: Final = "/admin/models_app/apikey/"


@dataclass
class Pages:
    """How many were loaded, by all browsers; why one of them stopped early."""

    loaded: int = 0
    failure: str = ""


class _Browser(threading.Thread):
    def __init__(self, port: int, cookie: str, pages: Pages, enough: threading.Event) -> None:
        super().__init__(name="browser", daemon=True)
        self._port = port
        self._cookie = cookie
        self._pages = pages
        self._enough = enough
        self.warm = threading.Event()  # the first page has come: templates are compiled

    def run(self) -> None:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=PATIENCE_S)
        try:
            while not self._enough.is_set() and not self._pages.failure:
                self._load(connection)
                self.warm.set()
        except (OSError, http.client.HTTPException) as error:
            self._pages.failure = f"{PAGE} was not answered: {error!r}"
        finally:
            self.warm.set()
            connection.close()

    def _load(self, connection: http.client.HTTPConnection) -> None:
        connection.request("GET", PAGE, headers={"Cookie": self._cookie})
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            self._pages.failure = f"{PAGE} answered {answer.status}"
        self._pages.loaded += 1


@contextmanager
def reloading(port: int, cookie: str) -> Iterator[Pages]:
    """Both reload for as long as the block lasts. Raises LoadFailed at its end where a page was not a page."""
    pages, enough = Pages(), threading.Event()
    browsers = [_Browser(port, cookie, pages, enough) for _ in range(BROWSERS)]
    for browser in browsers:
        browser.start()
    try:
        for browser in browsers:
            browser.warm.wait(PATIENCE_S)
        pages.loaded = 0
        yield pages
    finally:
        enough.set()
        for browser in browsers:
            browser.join(PATIENCE_S)
    if pages.failure:
        raise LoadFailed(pages.failure)
