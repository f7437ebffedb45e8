"""The harness itself: that the stand-in says what an engine says, that load is counted right, that verdicts follow figures."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import httpx
import pytest
import uvloop

from tests.bench import load, paced, report
from tests.bench.__main__ import parse
from tests.bench.load import CHAT, HOST, LoadFailed, Rate, Target
from tests.bench.measuring import Basics, Beside, Gateway, Loaded, Memory, Peer, Relayed, Results
from tests.bench.paced import Paced
from tests.bench.stage import Stage
from tests.bench.upstream import EVENTS, PACED
from tests.conftest import free_port


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """The stand-in as a process of its own."""
    target = Target(free_port())
    with ExitStack() as stack:
        stack.enter_context(Stage(tmp_path_factory.mktemp("bench"), dict(os.environ)).upstream(target.port))
        yield target


def url(target: Target, prefix: str = "") -> str:
    return f"http://{HOST}:{target.port}{prefix}{CHAT}"


@pytest.mark.parametrize("prefix", ["", PACED])
def test_a_stream_has_the_events_asked_for_then_usage_and_done(upstream: Target, prefix: str) -> None:
    call = {"model": "x", "stream": True, "max_tokens": 7, "stream_options": {"include_usage": True}}
    text = httpx.post(url(upstream, prefix), json=call).text
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    parsed = [json.loads(event) for event in events]
    assert {event["model"] for event in parsed} == {"x"}
    assert parsed.pop()["usage"]["completion_tokens"] == 20
    assert parsed.pop()["choices"][0]["finish_reason"] == "stop"
    assert parsed.pop(0)["choices"][0]["delta"]["role"] == "assistant"
    stamps = [int(event["choices"][0]["delta"]["content"]) for event in parsed]
    assert len(stamps) == 7
    assert stamps == sorted(stamps)


def test_a_stream_without_usage_asked_for_has_none(upstream: Target) -> None:
    text = httpx.post(url(upstream), json={"model": "x", "stream": True}).text
    assert text.count('"content":"') == EVENTS
    assert "usage" not in text


def test_requests_that_come_in_pieces_or_together_are_each_answered(upstream: Target) -> None:
    request = upstream.request(stream=False)

    async def talk() -> bytes:
        reader, writer = await asyncio.open_connection(HOST, upstream.port)
        for piece in (request[:10], request[10:-5], request[-5:] + request):
            writer.write(piece)
            await writer.drain()
        data = b""
        while data.count(b'"choices"') < 2:
            piece = await reader.read(65536)
            assert piece
            data += piece
        writer.close()
        return data

    assert asyncio.run(talk()).count(b"HTTP/1.1 200 OK") == 2


@pytest.mark.parametrize("stream", [False, True])
def test_our_own_generator_counts_whole_answers(upstream: Target, stream: bool) -> None:
    rate = uvloop.run(load._own(upstream, stream, connections=4, seconds=0.2))
    assert rate.bad == 0
    assert rate.requests >= 4
    assert 0 < rate.p50_ms <= rate.p99_ms


def test_our_own_generator_tells_answers_that_are_not_200() -> None:
    async def refuse() -> Rate:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\n{}")
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer, HOST, 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await load._own(Target(port), False, connections=3, seconds=0.1)

    assert uvloop.run(refuse()).bad == 3


def test_nobody_listening_is_said_not_measured() -> None:
    with pytest.raises(LoadFailed, match="cannot be reached"):
        paced.run(Target(free_port()), streams=2, seconds=0.1)


def test_paced_streams_are_read_to_their_end_and_are_hardly_late(upstream: Target) -> None:
    seen = paced.run(replace(upstream, path=PACED + CHAT), streams=3, seconds=0.1)
    assert (seen.broken, seen.events) == (0, 3 * EVENTS)
    assert 0 <= seen.late_p50_ms <= seen.late_p99_ms
    assert seen.first_p50_ms > 0


RATE = Rate(per_s=5000, p50_ms=1, p99_ms=2, requests=1000, bad=0)
BASICS = Basics(Loaded(RATE, 100), Loaded(RATE, 200), RATE)
STREAMS = (Paced(64, 20, 25, 0.5, 3, 6400, 0), Paced(512, 20, 25, 0.5, 3, 51200, 0))
MEMORY = Memory(gateway_idle=90, gateway_after=95, console_idle=120, console_after=150, requests=9000)
GATEWAY = Gateway("daphne", BASICS, tuple(Relayed(seen, 30) for seen in STREAMS), Beside(RATE, RATE, RATE, RATE, 20), MEMORY)
RESULTS = Results(BASICS, STREAMS, Peer(BASICS, GATEWAY.relayed), (GATEWAY,))


def test_figures_that_reach_their_targets_pass() -> None:
    assert {line.verdict for line in report.lines(GATEWAY, RESULTS)} == {report.PASS, ""}
    assert "The gateway on daphne" in report.text(RESULTS)


def test_a_figure_beyond_its_target_falls_short_and_no_other_does() -> None:
    slow = replace(GATEWAY, basics=replace(BASICS, plain=Loaded(replace(RATE, per_s=4000), 100)))
    short = [line for line in report.lines(slow, RESULTS) if line.verdict == report.SHORT]
    assert [line.target for line in short] == ["plain, 32 connections ≥ 4500 requests/s"]


def test_without_nginx_its_ratio_is_not_measured() -> None:
    unknown = [line for line in report.lines(GATEWAY, replace(RESULTS, nginx=None)) if line.verdict == report.UNKNOWN]
    assert len(unknown) == 1


def test_wrong_answers_of_any_run_are_counted() -> None:
    wrong = replace(RATE, bad=2)
    beside = replace(GATEWAY.beside, chat_beside=wrong)
    relayed = (replace(GATEWAY.relayed[0], paced=replace(STREAMS[0], broken=3)), GATEWAY.relayed[1])
    results = replace(RESULTS, nginx=None, gateways=(replace(GATEWAY, beside=beside, relayed=relayed),))
    assert RESULTS.bad() == 0
    assert results.bad() == 5


def test_a_foreign_upstream_is_for_serving_only() -> None:
    assert parse(["--serve", "--upstream", "http://127.0.0.1:1/v1"]).upstream == "http://127.0.0.1:1/v1"
    with pytest.raises(SystemExit):
        parse(["--upstream", "http://127.0.0.1:1/v1"])
