"""Streamed answers: relayed as they come, held back until the first event, kept warm, and never cut off silently."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest

from gateway_app.endpoints.relay import Patience
from models_app.models import State
from tests.fakes.scripted_upstream import Peer, ScriptedUpstream, chunk, completion_events, event, response, stream_head
from tests.gateway.conftest import Cast, Engine, Serve, Served, in_database, until

USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
EVENTS = completion_events(["Hel", "lo ✓"], usage=USAGE)
EVENTS[2] = EVENTS[2].replace(rb"\u2713", "✓".encode())  # engines write UTF-8


async def whole(peer: Peer) -> None:
    await peer.read_request()
    peer.write(stream_head() + b"".join(chunk(data) for data in EVENTS) + chunk(b""))


async def tiny(cast: Cast, *upstreams: ScriptedUpstream, **fields: Any) -> None:
    def make() -> None:
        model = cast.model(**fields)
        for upstream in upstreams:
            cast.instance(model, upstream.port)

    await in_database(make)


def payloads(text: str) -> list[Any]:
    """The data of every event; comments skipped."""
    found = [part.removeprefix("data: ") for part in text.split("\n\n") if part.startswith("data: ")]
    return [part if part == "[DONE]" else json.loads(part) for part in found]


def text_of(events: list[Any]) -> str:
    choices = [choice for item in events if item != "[DONE]" for choice in item.get("choices", ())]
    return "".join(choice["delta"].get("content", "") for choice in choices)


async def read_until_cut(
    gateway: Served, *, headers: Mapping[str, str] | None = None, **fields: Any
) -> tuple[httpx.Response, str]:
    """Everything a stream brings that must end without its terminating chunk."""
    text = ""
    body = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "hi"}], **fields}
    sent = {**gateway.headers(), **(headers or {})}
    async with gateway.client.stream("POST", "/v1/chat/completions", json=body, headers=sent) as reply:
        parts = reply.aiter_text()
        while part := await _next_before_the_cut(parts):
            text += part
    return reply, text


async def _next_before_the_cut(parts: AsyncIterator[str]) -> str:
    """The next part, "" when the connection was cut; a proper end fails the test."""
    try:
        return await anext(parts)
    except httpx.RemoteProtocolError:
        return ""


async def test_a_stream_is_relayed_and_its_usage_kept_for_us_alone(cast: Cast, serve: Serve, engine: Engine) -> None:
    upstream = await engine(whole)
    await tiny(cast, upstream)
    gateway = await serve()
    reply = await gateway.chat(stream=True)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache, no-transform"
    assert reply.headers["x-accel-buffering"] == "no"
    assert "content-encoding" not in reply.headers
    events = payloads(reply.text)
    assert text_of(events) == "Hello ✓"
    assert events[-1] == "[DONE]"
    assert not any("usage" in item for item in events[:-1])
    assert {item["model"] for item in events[:-1]} == {"tiny"}
    assert upstream.requests[0].json()["stream_options"] == {"include_usage": True}
    end = gateway.ends()[0]
    assert (end["prompt"], end["completion"], end["end"], end["stream"]) == (5, 2, "stop", True)
    assert end["first_ms"] is not None
    assert gateway.idle()


async def test_the_usage_event_is_passed_on_to_who_asks_for_it(cast: Cast, serve: Serve, engine: Engine) -> None:
    upstream = await engine(whole)
    await tiny(cast, upstream)
    gateway = await serve()
    reply = await gateway.chat(stream=True, stream_options={"include_usage": True, "other": 1})
    assert payloads(reply.text)[-2]["usage"] == USAGE
    assert upstream.requests[0].json()["stream_options"] == {"include_usage": True, "other": 1}
    reply = await gateway.chat(stream=True, stream_options={"include_usage": False, "other": 1})
    assert not any("usage" in item for item in payloads(reply.text)[:-1])
    assert upstream.requests[1].json()["stream_options"] == {"include_usage": True, "other": 1}


async def test_events_leave_as_they_come_however_the_bytes_are_split(cast: Cast, serve: Serve, engine: Engine) -> None:
    seen = asyncio.Event()

    async def dripping(peer: Peer) -> None:
        await peer.read_request()
        peer.write(stream_head() + chunk(EVENTS[0]))
        await seen.wait()
        for byte in b"".join(EVENTS[1:]):
            peer.write(chunk(bytes([byte])))
            await peer.drain()
        peer.write(chunk(b""))

    await tiny(cast, await engine(dripping))
    gateway = await serve()
    reader, writer = await gateway.open_chat(stream=True)
    head = await reader.readuntil(b'"role":"assistant"')
    assert b" 200 " in head
    seen.set()
    rest = await reader.readuntil(b"[DONE]\n\n\r\n0\r\n\r\n")
    assert "✓".encode() in rest
    writer.close()


async def test_comments_without_end_before_the_first_event_are_not_kept(cast: Cast, serve: Serve, engine: Engine) -> None:
    async def chatty(peer: Peer) -> None:
        await peer.read_request()
        peer.write(stream_head())
        for _ in range(40):
            peer.write(chunk(b": " + b"x" * 100_000 + b"\n\n"))
            await peer.drain()
        peer.write(b"".join(chunk(data) for data in EVENTS) + chunk(b""))

    await tiny(cast, await engine(chatty))
    gateway = await serve()
    reply = await gateway.chat(stream=True)
    assert text_of(payloads(reply.text)) == "Hello ✓"
    assert len(reply.text) < 1_000_000


async def test_a_cut_in_the_middle_is_told_and_the_connection_ends_abnormally(
    cast: Cast, serve: Serve, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    async def dying(peer: Peer) -> None:
        await peer.read_request()
        peer.write(stream_head() + chunk(EVENTS[0]) + chunk(EVENTS[1]) + chunk(EVENTS[2][:20]))
        await peer.drain()
        peer.close()

    await tiny(cast, await engine(dying))
    gateway = await serve()
    reply, text = await read_until_cut(gateway)
    assert reply.status_code == 200
    events = payloads(text)
    assert text_of(events) == "Hel"
    assert events[-1]["error"]["code"] == "upstream_stream_interrupted"
    assert "[DONE]" not in text
    end = gateway.ends()[0]
    assert (end["status"], end["end"], end["error_code"]) == (200, "error", "upstream_stream_interrupted")
    assert gateway.idle()
    # Beside Valkey, which is away in these tests, nothing is an error of ours.
    assert not [record for record in caplog.records if record.levelname == "ERROR" and "Valkey" not in record.getMessage()]


@pytest.mark.parametrize("ending", [b"\n\n", b"\r\n\r\n", b"\n", b""], ids=["LF", "CRLF", "no blank line", "no line end"])
@pytest.mark.parametrize("last", [-1, -2], ids=["after usage", "after the finish"])
async def test_a_stream_that_only_forgot_done_is_completed(
    cast: Cast, serve: Serve, engine: Engine, last: int, ending: bytes
) -> None:
    async def forgetful(peer: Peer) -> None:
        await peer.read_request()
        sent = b"".join(EVENTS[:last]).rstrip() + ending
        peer.write(stream_head() + chunk(sent) + chunk(b""))

    await tiny(cast, await engine(forgetful))
    gateway = await serve()
    events = payloads((await gateway.chat(stream=True)).text.replace("\r\n", "\n"))
    assert events[-1] == "[DONE]"
    assert text_of(events) == "Hello ✓"


async def test_a_stream_that_ends_properly_but_unfinished_is_no_answer(cast: Cast, serve: Serve, engine: Engine) -> None:
    async def unfinished(peer: Peer) -> None:
        await peer.read_request()
        peer.write(stream_head() + chunk(EVENTS[0]) + chunk(EVENTS[1]) + chunk(b""))

    await tiny(cast, await engine(unfinished))
    gateway = await serve()
    _, text = await read_until_cut(gateway)
    assert payloads(text)[-1]["error"]["code"] == "upstream_stream_interrupted"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        ({"code": 400, "message": "too long", "type": "exceed_context_size_error"}, 400, "context_length_exceeded"),
        ({"code": 500, "message": "slot failed"}, 502, "upstream_error"),
    ],
)
async def test_an_error_as_first_event_is_answered_with_its_real_status(
    cast: Cast, serve: Serve, engine: Engine, error: dict[str, Any], status: int, code: str
) -> None:
    async def refusing(peer: Peer) -> None:
        await peer.read_request()
        peer.write(stream_head() + chunk(b": hello\n\n") + chunk(event({"error": error})) + chunk(b""))

    await tiny(cast, await engine(refusing))
    gateway = await serve()
    reply = await gateway.chat(stream=True)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert reply.headers["content-type"] == "application/json"


async def test_an_error_in_the_middle_is_translated_and_ends_the_stream(cast: Cast, serve: Serve, engine: Engine) -> None:
    async def failing(peer: Peer) -> None:
        await peer.read_request()
        error = event({"error": {"code": 500, "message": "out of memory at /secret/path"}})
        peer.write(stream_head() + chunk(EVENTS[0] + EVENTS[1] + error) + chunk(b""))

    await tiny(cast, await engine(failing))
    gateway = await serve()
    _, text = await read_until_cut(gateway)
    assert text_of(payloads(text)) == "Hel"
    assert payloads(text)[-1]["error"]["code"] == "upstream_error"
    assert "/secret/path" not in text
    assert "[DONE]" not in text


async def test_an_engine_that_breaks_before_its_first_event_is_replaced(cast: Cast, serve: Serve, engine: Engine) -> None:
    async def silent(peer: Peer) -> None:
        await peer.read_request()
        peer.write(stream_head())
        await peer.drain()
        peer.close()

    bad, good = await engine(silent), await engine(whole)
    await tiny(cast, bad, good)
    gateway = await serve()
    for _ in range(2):
        reply = await gateway.chat(stream=True)
        assert reply.status_code == 200
        assert text_of(payloads(reply.text)) == "Hello ✓"
    assert bad.requests


async def test_before_the_status_an_error_has_its_own(cast: Cast, serve: Serve, engine: Engine) -> None:
    async def refusing(peer: Peer) -> None:
        await peer.read_request()
        peer.write(response(b'{"error":{"message":"bad grammar","code":400,"type":"invalid_request_error"}}', 400))

    await tiny(cast, await engine(refusing))
    gateway = await serve()
    reply = await gateway.chat(stream=True)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"] == "bad grammar"


async def test_a_slow_prefill_is_bridged_with_pings_until_content_flows(cast: Cast, serve: Serve, engine: Engine) -> None:
    warm, finish = asyncio.Event(), asyncio.Event()

    async def slow(peer: Peer) -> None:
        await peer.read_request()
        await warm.wait()
        peer.write(stream_head() + chunk(EVENTS[0]))  # a role, no content: the pings go on
        await finish.wait()
        peer.write(b"".join(chunk(data) for data in EVENTS[1:]) + chunk(b""))

    await tiny(cast, await engine(slow))
    gateway = await serve(patience=Patience(hold_s=0.05, ping_s=0.05))
    reader, writer = await gateway.open_chat(stream=True)
    assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
    for _ in range(2):
        await reader.readuntil(b": ping\n\n")
    warm.set()
    await reader.readuntil(b'"role":"assistant"')
    await reader.readuntil(b": ping\n\n")
    finish.set()
    rest = await reader.readuntil(b"0\r\n\r\n")
    assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert rest[rest.index(b"Hel") :].count(b"ping") == 0
    writer.close()


async def test_what_fails_after_the_pings_began_is_told_in_band(cast: Cast, serve: Serve) -> None:
    await in_database(lambda: cast.instance(cast.model(), None, State.STARTING))
    gateway = await serve(patience=Patience(hold_s=0.05, ping_s=0.05))
    reading = asyncio.create_task(read_until_cut(gateway))
    await until(lambda: gateway.gateway.slots.queued("tiny", "chat") == 1)
    made = gateway.gateway.directory.models["tiny"]
    assert made.local

    def disable() -> None:
        from models_app.models import ModelConfig

        ModelConfig.objects.update(enabled=False)

    await asyncio.sleep(0.1)  # past hold_s, so the status is out
    await in_database(disable)
    reply, text = await reading
    assert reply.status_code == 200
    assert text.startswith(": ping\n\n")
    assert payloads(text)[-1]["error"]["code"] == "model_not_found"


async def test_a_client_that_stops_reading_is_cut_off_in_the_end(cast: Cast, serve: Serve, engine: Engine) -> None:
    closed = asyncio.Event()
    word = completion_events(["x" * 60_000])[1]

    async def flood(peer: Peer) -> None:
        await peer.read_request()
        peer.write(stream_head())
        try:
            while True:
                peer.write(chunk(word))
                await peer.drain()
        except ConnectionError:
            closed.set()

    await tiny(cast, await engine(flood))
    gateway = await serve(patience=Patience(slow_reader_s=0.2, sweep_s=0.05))
    reader, writer = await gateway.open_chat(stream=True)
    await reader.readuntil(b"\r\n\r\n")
    await closed.wait()
    await until(gateway.idle)
    assert gateway.ends()[0]["error_code"] == "slow_reader"
    writer.close()
