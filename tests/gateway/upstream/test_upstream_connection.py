"""One upstream connection, fed by hand: any split of an answer, the bounds, and the requests it writes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_app.upstream.connection import HIGH_WATER, MAX_HEAD, Connection, UpstreamBroken
from gateway_app.upstream.origin import Origin, request_head

ORIGIN = Origin("127.0.0.1", 8080)


class Wire(asyncio.Transport):
    """A transport without a socket: keeps what is written and whether reading is paused, tells the protocol when it ends."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.reading = True
        self.aborted = False
        self.unsent = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        for data in list_of_data:
            self.write(data)

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


def connected(method: bytes = b"POST") -> tuple[Connection, Wire]:
    """A connection in whose wire a request has just been put."""
    connection = Connection(ORIGIN, asyncio.get_running_loop(), lambda _: None)
    wire = Wire()
    connection.connection_made(wire)
    connection.begin(method, b"HEAD", b"")
    return connection, wire


async def body_of(connection: Connection) -> bytes:
    """All of the body, as chunks of it come."""
    parts = []
    while data := await connection.next_chunk():
        parts.append(data)
    return b"".join(parts)


PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Two: 1\r\nx-two: 2\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\nTrailer: t\r\n\r\n"
INTERIM = b"HTTP/1.1 100 Continue\r\nX: no\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: no\r\n\r\n"


@pytest.mark.parametrize(
    "answer", [PLAIN, CHUNKED, INTERIM + PLAIN, INTERIM + CHUNKED], ids=["plain", "chunked", "100", "100 chunked"]
)
async def test_an_answer_cut_anywhere_is_the_same_answer(answer: bytes) -> None:
    headers = None
    for cut in range(len(answer) + 1):
        connection, wire = connected()
        for piece in (answer[:cut], answer[cut:]):
            if piece:
                connection.data_received(piece)
        await connection.head()
        assert headers in (None, connection.headers)
        headers = connection.headers
        assert connection.status == 200
        assert await body_of(connection) == b"hello"
        assert connection.reusable()
        assert not wire.aborted


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.binary(min_size=1, max_size=40), max_size=8), cuts=st.lists(st.integers(0, 600), max_size=8))
def test_any_body_in_any_chunks_and_pieces_comes_out_whole(parts: list[bytes], cuts: list[int]) -> None:
    async def scenario() -> None:
        chunked = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
        answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked + b"0\r\n\r\n"
        offsets = [0, *sorted(cut % len(answer) for cut in cuts), len(answer)]
        connection, _ = connected()
        for start, end in zip(offsets, offsets[1:], strict=False):  # noqa: RUF007 - pairwise reads worse here
            connection.data_received(answer[start:end])
        assert await body_of(connection) == b"".join(parts)
        assert connection.reusable()

    asyncio.run(scenario())


async def test_interim_answers_leave_nothing_behind() -> None:
    connection, _ = connected()
    connection.data_received(INTERIM + b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
    assert (connection.status, connection.headers) == (201, [(b"content-length", b"0")])


async def test_header_names_are_lower_case_and_repeated_ones_keep_their_order() -> None:
    connection, _ = connected()
    connection.data_received(PLAIN)
    assert connection.headers[:3] == [(b"content-type", b"application/json"), (b"x-two", b"1"), (b"x-two", b"2")]


async def test_all_that_has_come_is_taken_at_once() -> None:
    connection, _ = connected()
    connection.data_received(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n1\r\nb\r\n")
    connection.data_received(b"1\r\nc\r\n")
    assert await connection.next_chunk() == b"abc"
    connection.data_received(b"0\r\n\r\n")
    assert await connection.next_chunk() == b""


async def test_past_the_bound_the_socket_is_paused_until_the_reader_has_taken_all() -> None:
    connection, wire = connected()
    connection.data_received(b"HTTP/1.1 200 OK\r\n\r\n")
    connection.data_received(b"x" * HIGH_WATER)
    read = [wire.reading]
    connection.data_received(b"x")
    read.append(wire.reading)
    assert len(await connection.next_chunk()) == HIGH_WATER + 1
    assert [*read, wire.reading] == [True, False, True]


# --- how a body ends ---------------------------------------------------------------------------------------------------


async def test_a_body_of_unknown_length_ends_with_the_connection() -> None:
    connection, _ = connected()
    connection.data_received(b"HTTP/1.1 200 OK\r\n\r\nhel")
    connection.data_received(b"lo")
    connection.connection_lost(None)
    assert await body_of(connection) == b"hello"
    assert not connection.reusable()


@pytest.mark.parametrize("head", [b"Content-Length: 9", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("loss", [None, ConnectionResetError("reset")])
async def test_a_body_that_breaks_off_gives_what_came_and_then_fails(head: bytes, loss: Exception | None) -> None:
    connection, _ = connected()
    connection.data_received(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n5\r\nhello")
    connection.connection_lost(loss)
    assert await connection.next_chunk()
    with pytest.raises(UpstreamBroken):
        await connection.next_chunk()


async def test_a_reset_is_no_end_of_a_body_of_unknown_length() -> None:
    connection, _ = connected()
    connection.data_received(b"HTTP/1.1 200 OK\r\n\r\nhel")
    connection.connection_lost(ConnectionResetError("reset"))
    assert await connection.next_chunk() == b"hel"
    with pytest.raises(UpstreamBroken, match="reset"):
        await connection.next_chunk()


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_a_status_without_a_body_ends_with_its_head(status: bytes) -> None:
    connection, _ = connected()
    connection.data_received(b"HTTP/1.1 " + status + b"\r\n\r\n")
    assert await connection.next_chunk() == b""
    assert connection.reusable()


async def test_an_answer_to_head_has_no_body_whatever_its_length_says() -> None:
    connection, _ = connected(b"HEAD")
    connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    await connection.head()
    assert await connection.next_chunk() == b""
    assert not connection.reusable()


# --- keep-alive --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reusable"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nrubbish", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel", False),
    ],
)
async def test_a_connection_is_reusable_only_after_one_whole_answer_that_keeps_it_open(answer: bytes, reusable: bool) -> None:
    connection, _ = connected()
    connection.data_received(answer)
    await connection.head()
    assert connection.reusable() is reusable


async def test_an_answer_that_overtakes_its_request_leaves_the_connection_unfit() -> None:
    connection, wire = connected()
    wire.unsent = 1
    connection.data_received(PLAIN)
    assert not connection.reusable()


async def test_bytes_nobody_asked_for_end_the_connection_but_not_the_answer() -> None:
    connection, wire = connected()
    connection.data_received(PLAIN)
    connection.data_received(b"more")
    assert wire.aborted
    assert await body_of(connection) == b"hello"
    assert not connection.reusable()


async def test_a_second_exchange_starts_clean() -> None:
    connection, wire = connected()
    connection.data_received(CHUNKED)
    assert await body_of(connection) == b"hello"
    connection.begin(b"POST", b"SECOND", b"body")
    assert wire.written.endswith(b"SECONDbody")
    assert (connection.complete, connection.silent, connection.headers) == (False, True, [])
    connection.data_received(PLAIN)
    assert await body_of(connection) == b"hello"


# --- what is refused ---------------------------------------------------------------------------------------------------

FLOODS = {
    "one header": (b"HTTP/1.1 200 OK\r\nX: ", b"x" * 1024),
    "many headers": (b"HTTP/1.1 200 OK\r\n", b"X: 1\r\n" * 200),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 50),
    "reason": (b"HTTP/1.1 200 ", b"x" * 1024),
    "trailers": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: 1\r\n" * 200),
    "chunk extension": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=", b"x" * 1024),
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_a_flood_of_anything_but_body_is_cut_off(flood: str) -> None:
    start, more = FLOODS[flood]
    connection, wire = connected()
    if start:
        connection.data_received(start)
    for _ in range(2 * MAX_HEAD // len(more)):
        if wire.aborted:
            break
        connection.data_received(more)
    assert wire.aborted
    with pytest.raises(UpstreamBroken, match="headers"):
        await connection.next_chunk()


async def test_a_huge_head_that_comes_in_one_piece_is_refused() -> None:
    connection, wire = connected()
    connection.data_received(b"HTTP/1.1 200 OK\r\nX: " + b"x" * MAX_HEAD + b"\r\nContent-Length: 0\r\n\r\n")
    assert wire.aborted
    with pytest.raises(UpstreamBroken, match="headers"):
        await connection.head()


@pytest.mark.parametrize(
    "rubbish",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"<html>\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
    ],
)
async def test_what_is_not_http_breaks_the_exchange(rubbish: bytes) -> None:
    connection, wire = connected()
    connection.data_received(rubbish)
    assert wire.aborted
    with pytest.raises(UpstreamBroken):
        await connection.next_chunk()


async def test_a_reader_that_waits_is_told_when_the_connection_is_closed_on_this_side() -> None:
    connection, wire = connected()
    reader = asyncio.ensure_future(connection.head())
    await asyncio.sleep(0)
    connection.abort()
    with pytest.raises(UpstreamBroken):
        await reader
    assert wire.aborted


async def test_a_connection_given_up_while_connecting_is_closed_when_it_stands() -> None:
    connection = Connection(ORIGIN, asyncio.get_running_loop(), lambda _: None)
    connection.abort()
    wire = Wire()
    connection.connection_made(wire)
    assert wire.aborted


# --- requests ----------------------------------------------------------------------------------------------------------


def test_a_request_head_is_written_to_the_letter() -> None:
    assert request_head(ORIGIN, b"POST", b"/v1/x?y=1", [(b"a", b"1"), (b"b", b"")], 7) == (
        b"POST /v1/x?y=1 HTTP/1.1\r\nhost: 127.0.0.1:8080\r\nconnection: keep-alive\r\na: 1\r\nb: \r\ncontent-length: 7\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("method", "length", "told"), [(b"GET", 0, False), (b"GET", 3, True), (b"POST", 0, True), (b"PUT", 0, True)]
)
def test_the_length_is_told_where_a_body_may_be(method: bytes, length: int, told: bool) -> None:
    assert (b"content-length: %d" % length in request_head(ORIGIN, method, b"/", [], length)) is told


@pytest.mark.parametrize("bad", [b"a\r\nevil: 1", b"a\nb", b"a\rb", b"a\0b", b"a\n\rb"])
def test_no_part_of_a_request_can_smuggle_a_line(bad: bytes) -> None:
    for method, target, headers in (
        (bad, b"/", []),
        (b"GET", bad, []),
        (b"GET", b"/", [(bad, b"v")]),
        (b"GET", b"/", [(b"n", bad)]),
    ):
        with pytest.raises(ValueError, match="line break"):
            request_head(ORIGIN, method, target, headers, 0)


def test_a_target_with_a_blank_is_refused() -> None:
    with pytest.raises(ValueError, match="blank"):
        request_head(ORIGIN, b"GET", b"/a HTTP/1.1", [], 0)


@pytest.mark.parametrize(
    ("url", "origin", "path", "host"),
    [
        ("http://127.0.0.1:8080", Origin("127.0.0.1", 8080), "", b"127.0.0.1:8080"),
        ("http://example.org/", Origin("example.org", 80), "", b"example.org"),
        ("https://Example.org/openai/", Origin("example.org", 443, True, "example.org"), "/openai", b"example.org"),
        ("https://example.org:8443/a/b", Origin("example.org", 8443, True, "example.org"), "/a/b", b"example.org:8443"),
        ("http://[::1]:8080/v1", Origin("::1", 8080), "/v1", b"[::1]:8080"),
        ("http://bücher.example", Origin("xn--bcher-kva.example", 80), "", b"xn--bcher-kva.example"),
    ],
)
def test_an_address_becomes_an_origin_and_a_path(url: str, origin: Origin, path: str, host: bytes) -> None:
    assert Origin.from_url(url) == (origin, path)
    assert origin.host_header == host


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.org",
        "ftp://x",
        "http://",
        "http://u:p@x",
        "http://x?y=1",
        "http://x#y",
        "http://x:port",
        "http://x:99999",
        "/v1",
    ],
)
def test_any_other_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the words differ, what they have in common is the type
        Origin.from_url(url)
