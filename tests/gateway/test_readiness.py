"""/healthz says the process is up, /readyz whether traffic should come."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gateway_app.gateway import Gateway
from tests.gateway.conftest import NoConsole, Serve, config


async def test_health_needs_nothing(serve: Serve) -> None:
    gateway = await serve()
    reply = await gateway.client.get("/healthz")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})


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
