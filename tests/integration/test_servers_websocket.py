"""WebSockets on both servers, seen by a real client: messages, subprotocol, close codes, refusals, the end of the process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from tests.served import Served, served


@pytest.fixture(scope="module", params=["daphne", "uvicorn"])
def running(request: pytest.FixtureRequest) -> Iterator[Served]:
    with served(request.param) as process:
        yield process


@pytest.fixture
def server(running: Served) -> Served:
    running.get("/forget")
    return running


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as client:
        yield client


def url(server: Served, path: str = "/ws") -> str:
    return f"ws://127.0.0.1:{server.port}{path}"


async def test_text_binary_empty_and_large_messages_come_back(server: Served, session: aiohttp.ClientSession) -> None:
    async with session.ws_connect(url(server)) as socket:
        for text in ("hello", "", "ü" * 400_000):
            await socket.send_str(text)
            assert await socket.receive_str() == text
        for data in (b"\x00\xff", b"", b"x" * 900_000):
            await socket.send_bytes(data)
            assert await socket.receive_bytes() == data


async def test_the_application_chooses_the_subprotocol_and_knows_the_client(
    server: Served, session: aiohttp.ClientSession
) -> None:
    async with session.ws_connect(url(server), protocols=["one", "two"]) as socket:
        assert socket.protocol == "two"
        await socket.send_str("client")
        assert json.loads(await socket.receive_str())[0] == "127.0.0.1"


@pytest.mark.parametrize("code", [1000, 1001, 1008, 1011, 4001])
async def test_the_application_closes_with_any_code(server: Served, session: aiohttp.ClientSession, code: int) -> None:
    async with session.ws_connect(url(server)) as socket:
        await socket.send_str(f"close {code}")
        message = await socket.receive()

    assert (message.type, message.data, message.extra) == (aiohttp.WSMsgType.CLOSE, code, "as asked")


async def test_the_client_s_close_code_reaches_the_application(server: Served, session: aiohttp.ClientSession) -> None:
    async with session.ws_connect(url(server)) as socket:
        await socket.close(code=4711)

    assert await asyncio.to_thread(server.get, "/await/closed") == 4711


async def test_a_lost_connection_reaches_the_application(server: Served, session: aiohttp.ClientSession) -> None:
    socket = await session.ws_connect(url(server))
    await socket.send_str("hello")
    await socket.receive_str()

    transport = socket.get_extra_info("socket")
    assert transport is not None
    assert socket._response.connection is not None
    assert socket._response.connection.transport is not None
    socket._response.connection.transport.abort()

    assert await asyncio.to_thread(server.get, "/await/closed") in (1005, 1006)
    await socket.close()


async def test_a_refused_handshake_is_a_403(server: Served, session: aiohttp.ClientSession) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
        await session.ws_connect(url(server, "/refuse"))

    assert refusal.value.status == 403


async def test_a_failing_application_closes_the_socket_and_not_the_server(server: Served, session: aiohttp.ClientSession) -> None:
    async with session.ws_connect(url(server)) as socket:
        await socket.send_str("fail")
        message = await socket.receive()
        assert message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
        assert socket.close_code in (1006, 1011)
    async with session.ws_connect(url(server)) as socket:
        await socket.send_str("alive")
        assert await socket.receive_str() == "alive"


@pytest.mark.parametrize("kind", ["daphne", "uvicorn"])
async def test_the_end_of_the_process_closes_with_1012(session: aiohttp.ClientSession, kind: str) -> None:
    with served(kind) as process:
        async with session.ws_connect(url(process)) as socket:
            await socket.send_str("hello")
            await socket.receive_str()
            await asyncio.to_thread(process.terminate)

            message = await socket.receive()

            assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1012)
        assert await asyncio.to_thread(process.wait) == 0
