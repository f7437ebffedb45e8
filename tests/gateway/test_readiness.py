"""/healthz says the process is up, /readyz whether traffic should come."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway_app.gateway import Gateway
from tests.gateway.conftest import NoConsole, Serve, config


async def test_health_needs_nothing(serve: Serve) -> None:
    gateway = await serve()
    reply = await gateway.client.get("/healthz")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})


async def test_health_as_a_stream_comes_event_by_event(serve: Serve) -> None:
    gateway = await serve()
    async with gateway.client.stream("GET", "/healthz?stream=4") as reply:
        assert (reply.status_code, reply.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert reply.headers["x-accel-buffering"] == "no"
        pieces = [piece async for piece in reply.aiter_raw()]
    assert b"".join(pieces).decode() == "data: 1\n\ndata: 2\n\ndata: 3\n\ndata: 4\n\n"
    assert len(pieces) > 1  # a server that gathered them would have sent one


@pytest.mark.parametrize("asked", ["0", "11", "-1", "x", "", "5&x=1", "0005"])
async def test_a_stream_of_another_length_is_refused(serve: Serve, asked: str) -> None:
    gateway = await serve()
    reply = await gateway.client.get(f"/healthz?stream={asked}")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "stream")


async def test_only_so_many_health_streams_run_at_a_time(serve: Serve) -> None:
    gateway = await serve()
    replies = await asyncio.gather(*(gateway.client.get("/healthz?stream=5") for _ in range(12)))
    statuses = sorted(reply.status_code for reply in replies)
    assert statuses == [200] * 8 + [429] * 4, [reply.text for reply in replies]
    assert (await gateway.client.get("/healthz?stream=1")).status_code == 200


async def test_readiness_names_what_is_missing_to_this_machine_only(serve: Serve, valkey: str, tmp_path: Path) -> None:
    gateway = await serve(redis_url=valkey)
    reply = await gateway.get("/readyz")
    assert reply.status_code == 503
    assert reply.json()["checks"] == {"not_draining": True, "database": True, "valkey": True, "console": False}

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    console = await asyncio.start_unix_server(accept, tmp_path / "console.sock")
    async with console:
        reply = await gateway.get("/readyz")
        assert (reply.status_code, reply.json()["status"]) == (200, "ready")
        proxied = await gateway.get("/readyz", headers={"x-forwarded-for": "203.0.113.9"})
        assert proxied.json() == {"status": "ready"}
        gateway.gateway.drain()
        reply = await gateway.get("/readyz")
        assert (reply.status_code, reply.json()["checks"]["not_draining"]) == (503, False)
        assert (await gateway.get("/v1/models")).status_code == 200


async def test_a_gateway_that_never_started_stops_all_the_same(transactional_db: None, tmp_path: Path) -> None:
    gateway = Gateway(config(tmp_path / "spool", f"unix://{tmp_path}/no.sock"), NoConsole())
    await gateway.stop()
