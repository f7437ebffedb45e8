"""What both servers owe a client of HTTP, seen from outside: limits, framing, failures, hang-ups, slow readers."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import psutil
import pytest

from tests.fakes.served_app import FLOOD
from tests.served import Served, json_of, read_all, read_until, served, status_of

LIMIT = 1_000_000  # --max-body of the served application


@pytest.fixture(scope="module", params=["daphne", "uvicorn"])
def running(request: pytest.FixtureRequest) -> Iterator[Served]:
    with served(request.param) as process:
        yield process


@pytest.fixture
def server(running: Served) -> Served:
    running.get("/forget")
    return running


@pytest.fixture
def connection(server: Served) -> Iterator[socket.socket]:
    with server.connect() as client:
        yield client


def test_a_body_over_the_limit_by_content_length_is_refused_before_it_is_sent(connection: socket.socket) -> None:
    head = f"POST /echo HTTP/1.1\r\nhost: t\r\ncontent-length: {LIMIT + 1}\r\nexpect: 100-continue\r\n\r\n"
    connection.sendall(head.encode())

    answer = read_until(connection, b"}}")

    assert status_of(answer) == 413
    assert b"x-request-id: req-" in answer
    assert json_of(answer)["error"] == {
        "message": f"The request body is larger than {LIMIT} bytes.",
        "type": "invalid_request_error",
        "param": None,
        "code": "request_too_large",
    }


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_sends_everything_first_can_read_the_413(connection: socket.socket, chunked: bool) -> None:
    size = 3 * LIMIT
    if chunked:
        connection.sendall(b"POST /echo HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n")
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (size, b"x" * size)
    else:
        connection.sendall(b"POST /echo HTTP/1.1\r\nhost: t\r\ncontent-length: %d\r\n\r\n" % size)
        body = b"x" * size
    connection.sendall(body)

    answer = read_all(connection)

    assert status_of(answer) == 413
    assert json_of(answer)["error"]["code"] == "request_too_large"


def test_a_chunked_body_within_the_limit_arrives_whole(connection: socket.socket) -> None:
    connection.sendall(b"POST /echo HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n")
    connection.sendall(b"5\r\nhello\r\n" + b"%x\r\n%b\r\n0\r\n\r\n" % (LIMIT - 5, b"x" * (LIMIT - 5)))

    answer = json_of(read_until(connection, b"}"))

    assert answer["length"] == LIMIT
    assert answer["body"].startswith("hellox")


def test_a_client_that_expects_100_continue_is_told_to_go_on(connection: socket.socket) -> None:
    connection.sendall(b"POST /echo HTTP/1.1\r\nhost: t\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n")

    assert read_until(connection, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"

    connection.sendall(b"hi")
    assert json_of(read_until(connection, b"}"))["body"] == "hi"


@pytest.mark.parametrize(
    "garbage",
    [
        b"this is not HTTP\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: t\r\ncontent-length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: t\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header: t\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_bad_framing_is_answered_with_a_json_400(connection: socket.socket, garbage: bytes) -> None:
    connection.sendall(garbage)

    answer = read_all(connection)

    assert status_of(answer) == 400
    assert json_of(answer)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"], ids=["unfinished", "whole"])
def test_over_long_headers_are_answered_with_a_json_431(connection: socket.socket, end: bytes) -> None:
    connection.sendall(b"GET / HTTP/1.1\r\nhost: t\r\nx-long: " + b"x" * 150_000 + end)

    answer = read_all(connection)

    assert status_of(answer) == 431
    assert json_of(answer)["error"]["code"] == "request_headers_too_large"


@pytest.mark.parametrize(
    "flood", [b"0\r\nx-long: " + b"x" * 300_000, b"0\r\n" + b"x: y\r\n" * 60_000], ids=["one trailer", "many trailers"]
)
def test_trailers_without_end_are_refused(server: Served, connection: socket.socket, flood: bytes) -> None:
    connection.sendall(b"POST /echo HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n" + flood)

    read_all(connection)  # returns because the server gives the connection up

    assert server.get("/await/disconnect") is None


def test_a_trailer_is_no_header(connection: socket.socket) -> None:
    connection.sendall(b"POST /echo HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-late: 1\r\n\r\n")

    answer = json_of(read_until(connection, b"}"))

    assert (answer["length"], dict(answer["headers"]).get("x-late")) == (1, None)


@pytest.mark.parametrize(
    "framing", [b"content-length: 5\r\n\r\nhello", b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize("offer", [b"h2c", b"websocket"])
def test_a_body_arrives_also_beside_an_offer_to_upgrade(connection: socket.socket, framing: bytes, offer: bytes) -> None:
    head = b"POST /echo HTTP/1.1\r\nhost: t\r\nconnection: upgrade\r\nupgrade: %b\r\n" % offer
    connection.sendall((head + framing) * 2)

    answers = read_until(connection, b"}", 2)

    assert answers.count(b'"body": "hello"') == 2


def test_a_failure_before_the_answer_is_a_500(server: Served, connection: socket.socket) -> None:
    connection.sendall(b"GET /early-failure HTTP/1.1\r\nhost: t\r\n\r\n")

    answer = read_all(connection)

    assert status_of(answer) == 500
    assert server.get("/echo")["length"] == 0


@pytest.mark.parametrize("path", [b"/late-failure", b"/short-answer"])
def test_a_failure_in_mid_answer_closes_the_connection_visibly_unfinished(
    server: Served, connection: socket.socket, path: bytes
) -> None:
    connection.sendall(b"GET %b HTTP/1.1\r\nhost: t\r\n\r\n" % path)

    answer = read_all(connection)

    # Neither the last chunk nor the tenth byte ever comes, and the connection is closed.
    assert not answer.endswith(b"0\r\n\r\n")
    assert not answer.partition(b"\r\n\r\n")[2] or b"half" in answer
    assert server.get("/echo")["length"] == 0


def test_a_header_with_a_line_break_never_leaves(connection: socket.socket) -> None:
    connection.sendall(b"GET /split-header HTTP/1.1\r\nhost: t\r\n\r\n")

    answer = read_all(connection)

    assert b"x-injected" not in answer


def test_each_piece_of_a_stream_leaves_at_once(server: Served, connection: socket.socket) -> None:
    connection.sendall(b"GET /steps HTTP/1.1\r\nhost: t\r\n\r\n")
    for number in range(3):
        # The next piece is only made after this one was read here.
        assert b"data: %d\n\n" % number in read_until(connection, b"data: %d\n\n" % number)
        server.get("/happen/next")

    read_until(connection, b"0\r\n\r\n")


@pytest.mark.parametrize("path", ["/endless", "/silent"])
def test_a_hang_up_is_delivered_at_once(server: Served, connection: socket.socket, path: str) -> None:
    connection.sendall(f"GET {path} HTTP/1.1\r\nhost: t\r\n\r\n".encode())
    server.get("/await/begun")

    connection.close()

    assert server.get("/await/disconnect") is None


@pytest.mark.parametrize("path", ["/endless", "/silent"])
@pytest.mark.parametrize("before", [2, 1], ids=["together", "later"])
def test_a_hang_up_behind_pipelined_requests_is_delivered(
    server: Served, connection: socket.socket, path: str, before: int
) -> None:
    request = f"GET {path} HTTP/1.1\r\nhost: t\r\n\r\n".encode()
    connection.sendall(request * before)
    server.get("/await/begun")
    connection.sendall(request * (3 - before))

    connection.close()

    assert server.get("/await/disconnect") is None


def test_a_body_that_breaks_off_is_a_disconnect(server: Served, connection: socket.socket) -> None:
    connection.sendall(b"POST /echo HTTP/1.1\r\nhost: t\r\ncontent-length: 100\r\n\r\nabc")

    connection.close()

    assert server.get("/await/disconnect") is None


def test_a_slow_reader_holds_the_application_back(server: Served, connection: socket.socket) -> None:
    memory = psutil.Process(server.process.pid).memory_info
    before = memory().rss
    connection.sendall(b"GET /flood HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n")

    sent = server.get("/await/blocked")

    assert sent < FLOOD // 2
    assert memory().rss - before < 16 * 1024 * 1024
    assert len(read_all(connection).partition(b"\r\n\r\n")[2]) == FLOOD


def test_requests_on_one_connection_are_answered_one_after_the_other(connection: socket.socket) -> None:
    for number in range(3):
        connection.sendall(b"GET /echo/%d HTTP/1.1\r\nhost: t\r\n\r\n" % number)
        assert json_of(read_until(connection, b"}"))["path"] == f"/echo/{number}"


def test_pipelined_requests_are_answered_in_order(connection: socket.socket) -> None:
    requests = [b"POST /echo/%d HTTP/1.1\r\nhost: t\r\ncontent-length: 1\r\n\r\n%d" % (number, number) for number in range(3)]
    connection.sendall(b"".join(requests) + b"GET /empty HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n")

    answer = read_all(connection)

    assert answer.count(b"HTTP/1.1 ") == 4
    assert [answer.find(b'"path": "/echo/%d"' % number) for number in range(3)] == sorted(
        answer.find(b'"path": "/echo/%d"' % number) for number in range(3)
    )
    assert b'"body": "2"' in answer
    assert answer.rstrip().split(b"HTTP/1.1 ")[-1].startswith(b"204")


def test_garbage_after_a_request_does_not_disturb_its_answer(connection: socket.socket) -> None:
    connection.sendall(b"GET /echo HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\nnot HTTP at all\r\n\r\n")

    assert status_of(read_all(connection)) == 200


def test_head_is_answered_without_a_body(connection: socket.socket) -> None:
    connection.sendall(b"HEAD /echo HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n")

    head, _, body = read_all(connection).partition(b"\r\n\r\n")

    assert b"content-length" in head
    assert body == b""


def test_http_1_0_is_answered_and_closed(connection: socket.socket) -> None:
    connection.sendall(b"GET /echo?a=%20b HTTP/1.0\r\n\r\n")

    answer = read_all(connection)

    assert json_of(answer)["query"] == "a=%20b"


def test_an_answer_before_the_body_was_read_reaches_the_client(connection: socket.socket) -> None:
    connection.sendall(b"POST /early-answer HTTP/1.1\r\nhost: t\r\ncontent-length: 500000\r\n\r\n" + b"x" * 500_000)

    assert status_of(read_until(connection, b"{}")) == 200
