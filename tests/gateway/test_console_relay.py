"""The console relay between a real client, both gateway servers and a real console process on its Unix socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from gateway_app.console_relay import sendable
from gateway_app.forwarded import ForwardedHeaders
from tests.served import Served, json_of, read_all, read_until, served, status_of


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("c")
    folder.chmod(0o700)
    with served("daphne", "--unix", str(folder / "c.sock"), "--max-body", "5000000"):
        yield folder / "c.sock"


@pytest.fixture(scope="module", params=["daphne", "uvicorn"])
def running(request: pytest.FixtureRequest, console: Path) -> Iterator[Served]:
    with served(request.param, "--relay", str(console), "--max-body", "5000000") as process:
        yield process


@pytest.fixture
def gateway(running: Served) -> Served:
    running.get("/forget")
    return running


@pytest.fixture
def http(gateway: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{gateway.port}", trust_env=False) as client:
        yield client


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as client:
        yield client


def sent_headers(answer: httpx.Response) -> dict[str, str]:
    """The headers as the console got them."""
    return dict(answer.json()["headers"])


def test_repeated_cookies_path_and_query_pass_untouched(http: httpx.Client) -> None:
    answer = http.get("/echo/a%2Fb%20c?q=%C3%BC&q=2")

    assert answer.headers.get_list("set-cookie") == ["a=1; Path=/", "b=2; Path=/"]
    assert answer.json()["path"] == "/echo/a/b c"
    assert answer.json()["query"] == "q=%C3%BC&q=2"


def test_our_forwarded_headers_replace_the_client_s_own(http: httpx.Client) -> None:
    answer = http.get("/echo", headers={"x-forwarded-for": "1.2.3.4", "x-forwarded-proto": "https", "forwarded": "for=1.2.3.4"})

    headers = sent_headers(answer)
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["x-forwarded-proto"] == "http"
    assert headers["x-forwarded-host"] == headers["host"] == http.base_url.netloc.decode()
    assert "forwarded" not in headers
    assert answer.json()["client"][0] == "127.0.0.1"
    assert answer.json()["scheme"] == "http"


def test_hop_by_hop_headers_stay_behind(http: httpx.Client) -> None:
    answer = http.get("/echo", headers={"connection": "keep-alive, x-mine", "x-mine": "1", "te": "trailers", "x-other": "2"})

    headers = sent_headers(answer)
    assert headers["x-other"] == "2"
    assert not {"x-mine", "te", "connection"} & set(headers)


def test_bodies_arrive_whole_with_and_without_a_length(http: httpx.Client) -> None:
    counted = http.post("/echo", content=b"x" * 3_000_000)
    chunked = http.post("/echo", content=(piece for piece in [b"x" * 1_000_000] * 3))
    empty = http.post("/echo")

    assert counted.json()["length"] == chunked.json()["length"] == 3_000_000
    assert sent_headers(counted)["content-length"] == "3000000"
    assert empty.json()["length"] == 0


def test_head_and_204_have_no_body(http: httpx.Client) -> None:
    head = http.head("/echo")

    assert int(head.headers["content-length"]) > 100
    assert head.content == b""
    assert http.get("/empty").status_code == 204
    assert http.get("/echo").status_code == 200


def test_the_data_plane_is_never_relayed(http: httpx.Client) -> None:
    for path in ("/v1", "/v1/models"):
        answer = http.get(path)
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_and_its_answer_stream_both_ways_at_once(gateway: Served) -> None:
    with gateway.connect() as connection:
        connection.sendall(b"POST /duet HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n")
        for word in (b"one", b"two"):
            connection.sendall(b"3\r\n%b\r\n" % word)
            read_until(connection, word)
        connection.sendall(b"0\r\n\r\n")
        read_until(connection, b"0\r\n\r\n")


def test_a_hang_up_reaches_the_console(gateway: Served) -> None:
    with gateway.connect() as connection:
        connection.sendall(b"GET /endless HTTP/1.1\r\nhost: t\r\n\r\n")
        read_until(connection, b"first")

    assert gateway.get("/await/disconnect") is None


def test_a_hang_up_in_mid_body_reaches_the_console(gateway: Served) -> None:
    with gateway.connect() as connection:
        connection.sendall(b"POST /duet HTTP/1.1\r\nhost: t\r\ncontent-length: 100\r\n\r\nabc")
        read_until(connection, b"abc")

    assert gateway.get("/await/disconnect") is None


def test_an_answer_that_breaks_off_in_the_console_breaks_off_here(gateway: Served) -> None:
    with gateway.connect() as connection:
        connection.sendall(b"GET /late-failure HTTP/1.1\r\nhost: t\r\n\r\n")
        answer = read_all(connection)

    assert b"half" in answer
    assert not answer.endswith(b"0\r\n\r\n")


async def test_websockets_pass_messages_subprotocol_and_client(gateway: Served, session: aiohttp.ClientSession) -> None:
    async with session.ws_connect(f"ws://127.0.0.1:{gateway.port}/ws", protocols=["a", "b"]) as socket:
        assert socket.protocol == "b"
        await socket.send_str("héllo")
        assert await socket.receive_str() == "héllo"
        for data in (b"\x00\xff", b"", b"x" * 900_000):
            await socket.send_bytes(data)
            assert await socket.receive_bytes() == data
        await socket.send_str("client")
        assert json.loads(await socket.receive_str())[0] == "127.0.0.1"


@pytest.mark.parametrize("code", [1000, 1011, 4001])
async def test_the_console_s_close_code_reaches_the_client(gateway: Served, session: aiohttp.ClientSession, code: int) -> None:
    async with session.ws_connect(f"ws://127.0.0.1:{gateway.port}/ws") as socket:
        await socket.send_str(f"close {code}")
        message = await socket.receive()

    assert (message.type, message.data, message.extra) == (aiohttp.WSMsgType.CLOSE, code, "as asked")


async def test_the_client_s_close_code_reaches_the_console(gateway: Served, session: aiohttp.ClientSession) -> None:
    async with session.ws_connect(f"ws://127.0.0.1:{gateway.port}/ws") as socket:
        await socket.close(code=4711)

    assert await asyncio.to_thread(gateway.get, "/await/closed") == 4711


async def test_a_handshake_refused_by_the_console_is_refused_here(gateway: Served, session: aiohttp.ClientSession) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
        await session.ws_connect(f"ws://127.0.0.1:{gateway.port}/refuse")

    assert refusal.value.status == 403


@pytest.mark.parametrize("kind", ["daphne", "uvicorn"])
def test_a_killed_console_gives_502_and_its_successor_answers(kind: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "c.sock"
    with served(kind, "--relay", str(path)) as gateway, gateway.connect() as connection:
        with served("daphne", "--unix", str(path)) as console:
            connection.sendall(b"GET /endless HTTP/1.1\r\nhost: t\r\n\r\n")
            read_until(connection, b"first")
            console.process.kill()
            assert not read_all(connection).endswith(b"0\r\n\r\n")

        assert_unavailable(gateway)

        with served("daphne", "--unix", str(path)):
            assert gateway.get("/echo")["path"] == "/echo"


def assert_unavailable(gateway: Served) -> None:
    for accept, kind, text in (
        ("text/html", "text/html", "this page reloads"),
        ("*/*", "application/json", "console_unavailable"),
    ):
        with gateway.connect() as connection:
            connection.sendall(f"GET /admin/ HTTP/1.1\r\nhost: t\r\naccept: {accept}\r\nconnection: close\r\n\r\n".encode())
            answer = read_all(connection)
        assert status_of(answer) == 502
        assert f"content-type: {kind}".encode() in answer
        assert b"retry-after: 2" in answer
        assert text.encode() in answer
    with gateway.connect() as connection:
        connection.sendall(
            b"POST /admin/ HTTP/1.1\r\nhost: t\r\naccept: text/html\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        )
        assert json_of(read_all(connection))["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    ("code", "passed_on"),
    [(None, 1000), (1005, 1000), (1006, 1011), (1015, 1011), (1004, 1011), (999, 1011), (1012, 1012), (3000, 3000), (4999, 4999)],
)
def test_close_codes_that_no_peer_may_send_are_replaced(code: int | None, passed_on: int) -> None:
    assert sendable(code) == passed_on


def scope(client: str, **headers: str) -> dict[str, Any]:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"client": (client, 5555), "scheme": "http", "headers": raw}


def test_a_trusted_proxy_is_believed_about_its_client() -> None:
    forwarded = dict(
        ForwardedHeaders(["10.0.0.0/8"]).of(
            scope(
                "10.0.0.1",
                host="inner",
                x_forwarded_for="6.6.6.6, 203.0.113.9, 10.0.0.2",
                x_forwarded_proto="https",
                x_forwarded_host="assistant.example",
            )
        )
    )

    # 6.6.6.6 is what the client itself claimed.
    assert forwarded == {
        "X-Forwarded-For": "203.0.113.9",
        "X-Forwarded-Port": "0",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "assistant.example",
    }


def test_a_stranger_is_not_believed() -> None:
    forwarded = dict(
        ForwardedHeaders(["10.0.0.1"]).of(
            scope("203.0.113.9", host="outer", x_forwarded_for="10.0.0.1", x_forwarded_proto="https", x_forwarded_host="evil")
        )
    )

    assert forwarded == {
        "X-Forwarded-For": "203.0.113.9",
        "X-Forwarded-Port": "5555",
        "X-Forwarded-Proto": "http",
        "X-Forwarded-Host": "outer",
    }


def test_a_proxy_setting_that_is_no_address_is_refused() -> None:
    with pytest.raises(ValueError, match="not appear to be"):
        ForwardedHeaders(["proxy.example"])
