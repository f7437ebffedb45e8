"""A client that goes away frees everything at once, in whichever phase of its request it goes."""

from __future__ import annotations

import asyncio

import pytest

from models_app.models import State
from tests.fakes.scripted_upstream import Peer, chunk, completion_events, response, stream_head
from tests.gateway.conftest import Cast, Engine, Serve, Served, in_database, until

EVENTS = completion_events(["a", "b"])


async def ended(gateway: Served) -> None:
    """Everything is given back, and the end is recorded as the client's."""
    await until(lambda: gateway.ends() and gateway.idle())
    assert [end["end"] for end in gateway.ends()] == ["client_gone"]
    assert gateway.ends()[0]["status"] in (0, 200)
    record = gateway.gateway.keys.table.find(gateway.key)
    assert record is not None
    assert gateway.gateway.limits.running(record) == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_while_the_engine_has_not_answered(cast: Cast, serve: Serve, engine: Engine, stream: bool) -> None:
    closed = asyncio.Event()

    async def silent(peer: Peer) -> None:
        await peer.read_request()
        await peer.wait_closed()
        closed.set()

    upstream = await engine(silent)
    await in_database(lambda: cast.instance(cast.model(slots=1), upstream.port))
    gateway = await serve()
    _, writer = await gateway.open_chat(stream=stream)
    await upstream.until(lambda: len(upstream.requests) == 1)
    writer.close()
    await closed.wait()
    await ended(gateway)


async def test_in_the_middle_of_a_stream(cast: Cast, serve: Serve, engine: Engine) -> None:
    closed = asyncio.Event()

    async def endless(peer: Peer) -> None:
        await peer.read_request()
        peer.write(stream_head() + chunk(EVENTS[0]) + chunk(EVENTS[1]))
        await peer.wait_closed()
        closed.set()

    upstream = await engine(endless)
    await in_database(lambda: cast.instance(cast.model(slots=1), upstream.port))
    gateway = await serve()
    reader, writer = await gateway.open_chat(stream=True)
    await reader.readuntil(b'"content":"a"')
    writer.close()
    await closed.wait()
    await ended(gateway)


async def test_in_the_middle_of_a_plain_body(cast: Cast, serve: Serve, engine: Engine) -> None:
    closed = asyncio.Event()

    async def half(peer: Peer) -> None:
        await peer.read_request()
        peer.write(response(b'{"choices": [' + b" " * 1000)[:-500])
        await peer.wait_closed()
        closed.set()

    upstream = await engine(half)
    await in_database(lambda: cast.instance(cast.model(slots=1), upstream.port))
    gateway = await serve()
    _, writer = await gateway.open_chat()
    await upstream.until(lambda: len(upstream.requests) == 1)
    writer.close()
    await closed.wait()
    await ended(gateway)


@pytest.mark.parametrize("stream", [False, True])
async def test_while_waiting_for_a_slot(cast: Cast, serve: Serve, engine: Engine, stream: bool) -> None:
    await in_database(lambda: cast.instance(cast.model(), None, State.STARTING))
    gateway = await serve()
    _, writer = await gateway.open_chat(stream=stream)
    await until(lambda: gateway.gateway.slots.queued("tiny", "chat") == 1)
    writer.close()
    await ended(gateway)


async def test_its_slot_goes_to_the_next_in_the_queue(cast: Cast, serve: Serve, engine: Engine) -> None:
    async def first_silent(peer: Peer) -> None:
        request = await peer.read_request()
        if request.json()["seed"] == 0:
            await peer.wait_closed()
        else:
            peer.write(response(b'{"choices": []}'))

    upstream = await engine(first_silent)
    await in_database(lambda: cast.instance(cast.model(slots=1), upstream.port))
    gateway = await serve()
    _, writer = await gateway.open_chat(seed=0)
    await upstream.until(lambda: len(upstream.requests) == 1)
    second = asyncio.create_task(gateway.chat(seed=1))
    await until(lambda: gateway.gateway.slots.queued("tiny", "chat") == 1)
    writer.close()
    assert (await second).status_code == 200


async def test_before_its_body_is_complete(serve: Serve) -> None:
    gateway = await serve()
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\nauthorization: Bearer {gateway.key}\r\ncontent-length: 500\r\n\r\n"
    writer.write(head.encode() + b'{"model"')
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert (await gateway.get("/v1/models")).status_code == 200
    assert gateway.events() == []  # it was never admitted
    assert reader.at_eof() or not await reader.read()
