"""The link to a real Valkey: use keys, telemetry, hints, and life without it."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from assistant_site.valkey import Valkey
from models_app.contracts.coordination import EVENTS, PREFIX, USE_LIFE_MS, telemetry_key, use_key, use_pattern
from models_app.models import Instance, State
from tests.fakes.scripted_upstream import Peer, response
from tests.gateway.conftest import Cast, Engine, Serve, broker_url, in_database, telemetry, until


async def good(peer: Peer) -> None:
    await peer.read_request()
    peer.write(response(b'{"choices": []}'))


async def test_a_ready_instance_is_held_before_it_is_used_and_given_back_when_idle(
    cast: Cast, serve: Serve, engine: Engine, broker: Valkey, live: Redis
) -> None:
    proceed = asyncio.Event()

    async def gated(peer: Peer) -> None:
        await peer.read_request()
        await proceed.wait()
        peer.write(response(b'{"choices": []}'))

    upstream = await engine(gated)
    row = await in_database(lambda: cast.instance(cast.model(), upstream.port))
    gateway = await serve(redis_url=broker_url(broker))
    key = use_key(row.pk, 1, gateway.gateway.id)
    assert 0 < await live.pttl(key) <= USE_LIFE_MS
    assert [name async for name in live.scan_iter(use_pattern(row.pk, 1))] == [key]

    call = asyncio.create_task(gateway.chat())
    await upstream.until(lambda: len(upstream.requests) == 1)
    await in_database(lambda: Instance.objects.update(state=State.DRAINING))
    await until(lambda: not gateway.gateway.directory.backends)
    gateway.gateway.link.hasten()
    await asyncio.sleep(0.1)
    assert await live.exists(key)  # a request of ours still runs there
    proceed.set()
    assert (await call).status_code == 200
    while await live.exists(key):
        await asyncio.sleep(0.01)


async def test_a_new_instance_is_not_used_before_its_key_is_held(
    cast: Cast, serve: Serve, engine: Engine, broker: Valkey, live: Redis
) -> None:
    upstream = await engine(good)
    gateway = await serve(redis_url=broker_url(broker))
    row = await in_database(lambda: cast.instance(cast.model(), upstream.port))
    await live.publish(EVENTS, '{"type": "revision"}')
    seen: list[bool] = []

    async def watch() -> None:
        while not seen or not seen[-1]:
            backends = list(gateway.gateway.directory.backends.values())
            if backends:
                seen.append(backends[0].allowed)
                if seen[-1]:
                    return
            await asyncio.sleep(0)

    await watch()
    assert seen[0] is False
    assert await live.exists(use_key(row.pk, 1, gateway.gateway.id))
    assert (await gateway.chat()).status_code == 200


async def test_a_hint_hastens_the_comparison(cast: Cast, serve: Serve, broker: Valkey, live: Redis) -> None:
    gateway = await serve(redis_url=broker_url(broker))
    while not (await live.pubsub_numsub(EVENTS))[0][1]:
        await asyncio.sleep(0.01)
    await in_database(lambda: cast.model("fresh"))
    checks = gateway.gateway.feed.checks
    await live.publish(EVENTS, '{"type": "revision"}')
    await until(lambda: "fresh" in gateway.gateway.directory.names)
    assert gateway.gateway.feed.checks <= checks + 2


async def test_telemetry_says_what_is_queued_and_busy_and_everything_goes_at_the_end(
    cast: Cast, serve: Serve, engine: Engine, broker: Valkey, live: Redis
) -> None:
    async def silent(peer: Peer) -> None:
        await peer.read_request()
        await peer.wait_closed()

    upstream = await engine(silent)
    row = await in_database(lambda: cast.instance(cast.model(slots=1), upstream.port))
    gateway = await serve(redis_url=broker_url(broker))
    calls = [asyncio.create_task(gateway.chat()) for _ in range(2)]
    await until(lambda: gateway.gateway.slots.queued("tiny", "chat") == 1 and upstream.requests)
    while not (found := await telemetry(gateway, live))["models"]["tiny"]["chat"]["queued"]:
        await asyncio.sleep(0.01)
    assert found["gateway"] == gateway.gateway.id
    assert found["instances"][f"{row.pk}:1"]["in_flight"] == 1
    assert found["instances"][f"{row.pk}:1"]["last_end_s"] is None
    assert 0 < await live.pttl(telemetry_key(gateway.gateway.id)) <= 5000
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await gateway.gateway.link.stop()
    assert [name async for name in live.scan_iter(PREFIX + "*")] == []


async def test_an_instance_that_returns_from_draining_is_used_again_with_all_it_counted(
    cast: Cast, serve: Serve, engine: Engine, broker: Valkey, live: Redis
) -> None:
    proceed = asyncio.Event()

    async def gated(peer: Peer) -> None:
        await peer.read_request()
        await proceed.wait()
        peer.write(response(b'{"choices": []}'))

    upstream = await engine(gated)
    row = await in_database(lambda: cast.instance(cast.model(slots=2), upstream.port))
    gateway = await serve(redis_url=broker_url(broker))
    (backend,) = gateway.gateway.directory.backends.values()
    call = asyncio.create_task(gateway.chat())
    await upstream.until(lambda: len(upstream.requests) == 1)

    await in_database(lambda: Instance.objects.update(state=State.DRAINING))
    await until(lambda: backend.retired)
    gateway.gateway.link.hasten()
    found = await telemetry(gateway, live)
    assert found["instances"][f"{row.pk}:1"]["in_flight"] == 1  # who drains it must see what still runs
    await in_database(lambda: Instance.objects.update(state=State.READY))
    await until(lambda: gateway.gateway.directory.backends)
    assert list(gateway.gateway.directory.backends.values()) == [backend]
    assert (backend.in_flight, backend.has_room) == (1, True)
    proceed.set()
    assert (await call).status_code == 200
    last_end = backend.last_end
    assert last_end is not None

    key = use_key(row.pk, 1, gateway.gateway.id)
    await in_database(lambda: Instance.objects.update(state=State.DRAINING))
    while await live.exists(key):  # idle this time: given back
        await asyncio.sleep(0.01)
    await in_database(lambda: Instance.objects.update(state=State.READY))
    await until(lambda: backend.has_room)
    assert await live.exists(key)
    assert backend.last_end == last_end
    assert (await gateway.chat()).status_code == 200
    assert gateway.idle()


async def test_telemetry_says_how_long_a_busy_backend_has_been_silent(
    cast: Cast, serve: Serve, engine: Engine, broker: Valkey, live: Redis
) -> None:
    async def silent(peer: Peer) -> None:
        await peer.read_request()
        await peer.wait_closed()

    upstream = await engine(silent)
    row = await in_database(lambda: cast.instance(cast.model(), upstream.port))
    gateway = await serve(redis_url=broker_url(broker))
    key = f"{row.pk}:1"
    assert (await telemetry(gateway, live))["instances"][key]["silent_s"] is None
    call = asyncio.create_task(gateway.chat())
    await upstream.until(lambda: len(upstream.requests) == 1)
    (backend,) = gateway.gateway.directory.backends.values()
    seated = next(iter(backend.running.values()))
    assert backend.silent_s(seated + 7) == 7
    backend.last_byte = seated + 4
    assert backend.silent_s(seated + 7) == 3
    backend.last_byte = None
    while not ((await telemetry(gateway, live))["instances"][key]["silent_s"] or 0) > 0:
        await asyncio.sleep(0.01)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await until(gateway.idle)
    assert not backend.running
    while (await telemetry(gateway, live))["instances"][key]["silent_s"] is not None:
        await asyncio.sleep(0.01)


async def test_requests_go_on_while_valkey_is_away_and_new_instances_too(
    cast: Cast, serve: Serve, engine: Engine, broker: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    upstream = await engine(good)

    await in_database(lambda: cast.instance(cast.model("first"), upstream.port))
    with broker.running():
        gateway = await serve(redis_url=broker_url(broker))
        assert (await gateway.chat("first")).status_code == 200
        assert gateway.gateway.link.up
    await until(lambda: gateway.gateway.link.up is False)
    assert (await gateway.chat("first")).status_code == 200

    def replace() -> None:
        Instance.objects.update(state=State.STOPPED)
        cast.instance(cast.model("second"), upstream.port)

    await in_database(replace)
    assert (await gateway.chat("first", headers={"prefer": "wait=0"})).status_code in (200, 503)
    await until(lambda: "second" in gateway.gateway.directory.names)
    assert (await gateway.chat("second")).status_code == 200
    readiness = await gateway.get("/readyz")
    assert (readiness.status_code, readiness.json()["checks"]["valkey"]) == (503, False)
    with broker.running():
        await until(lambda: gateway.gateway.link.up)
        assert (await gateway.chat("second")).status_code == 200
    told = [record for record in caplog.records if record.name == "gateway_app.control_link"]
    assert [record.levelname for record in told][:2] == ["ERROR", "INFO"]
