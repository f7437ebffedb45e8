"""The httptools parser of both our servers, declining upgrades that nobody here speaks."""

from __future__ import annotations

from array import array
from typing import Any, Protocol

import httptools

Headers = list[tuple[bytes, bytes]]


class Reader(Protocol):
    """Whose callbacks the parser calls."""

    def declined_upgrade(self) -> bytes | None:
        """The head of the request just read as if it had asked for no upgrade; None where the upgrade is taken."""


class RequestParser(httptools.HttpRequestParser):
    """Reads a request that offers an upgrade we do not take as the plain request it is as well.

    Java's HTTP client and `curl --http2` offer h2c with every request, and httptools takes the body of such a one for the new
    protocol. So its head is read again without the offer; the reader's callbacks come twice.
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        self._reader = reader
        # Bytes after a request that said "close" are ignored by us, not an error to answer in the middle of its answer.
        self.set_dangerous_leniencies(lenient_data_after_close=True)

    def feed_data(self, data: bytes | bytearray | memoryview[int] | array[int]) -> None:
        data = bytes(data)
        while True:
            try:
                super().feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                head = self._reader.declined_upgrade()
                if head is None:
                    raise
                data = head + data[upgrade.args[0] :]


def head_without_upgrade(parser: Any, target: bytes, headers: Headers) -> bytes:
    """The head that was just read, the offer left out."""
    lines = [b"%b %b HTTP/%b\r\n" % (parser.get_method(), target, parser.get_http_version().encode("ascii"))]
    lines += [b"%b: %b\r\n" % header for header in headers if header[0] != b"upgrade"]
    return b"".join(lines) + b"\r\n"
