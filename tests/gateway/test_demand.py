"""Loading on demand as the gateway sees it: what it wants, whom it wakes, and what it tells those who wait.

The control plane is emulated here: the tests hear of demand, write the progress of loads and move the rows as it would.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from assistant_site.valkey import Valkey
from gateway_app.endpoints.relay import Patience
from gateway_app.endpoints.waiting import WaitingRoom
from gateway_app.errors import ApiError
from gateway_app.keys import KeyRecord
from gateway_app.loads import Loads
from gateway_app.routing.backends import Backend, Model, Offer
from gateway_app.routing.demand import Demand
from gateway_app.routing.slots import QUEUE_AT_LEAST, Slots, Waiter
from gateway_app.upstream.origin import Origin
from models_app.contracts.coordination import (
    DEMAND,
    DEMAND_LIFE_S,
    EVENTS,
    LOAD_LIFE_S,
    LOADS,
    TELEMETRY_PATTERN,
    LoadProgress,
    PartTelemetry,
    load_field,
    telemetry_key,
)
from models_app.contracts.traits import CHAT, EMBEDDINGS
from models_app.models import Instance, ModelConfig, State
from tests.fakes.scripted_upstream import Peer, response
from tests.gateway.conftest import Cast, Engine, Serve, Served, broker_url, in_database, telemetry, until
from tests.gateway.test_streams import payloads, read_until_cut

# --- demand, played with a clock ---------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def model(*ready: str, name: str = "m", parts: tuple[str, ...] = ("chat", "embedding"), local: bool = True) -> Model:
    """A model whose chat and embeddings are processes of their own; ready: the endpoints that have one now."""
    backend = Backend(name="b", ident="b", origin=Origin("127.0.0.1", 1), targets={}, headers=())
    offers = {endpoint: (Offer(backend, name),) for endpoint in ready}
    return Model(name, 0, frozenset({CHAT, EMBEDDINGS}), offers, local=local, parts=parts)


class Played:
    """Demand with a clock of its own, and how often it called for the control plane."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.calls = 0
        self.demand = Demand(self._called, self.clock)

    def _called(self) -> None:
        self.calls += 1

    def review(self, *models: Model, waiting: Callable[[str, str], int] = lambda _name, _part: 0) -> None:
        self.demand.review({each.name: each for each in models}, waiting)


def test_the_first_demand_calls_and_the_rest_only_prolong_it() -> None:
    played = Played()
    for _ in range(100):
        played.demand.ask(model(), "chat")
        played.clock.now += 1
    assert (played.calls, played.demand.begun) == (1, 1)
    played.clock.now += DEMAND_LIFE_S - 2
    assert played.demand.stands("m", "chat")
    played.clock.now += 2
    assert not played.demand.stands("m", "chat")
    played.demand.ask(model(), "chat")
    assert played.calls == 2


def test_a_demand_is_renewed_while_somebody_waits_and_forgotten_when_it_is_old() -> None:
    played = Played()
    played.demand.ask(model(), "chat")
    for _ in range(100):
        played.clock.now += 1
        played.review(model(), waiting=lambda _name, part: int(part == "chat"))
    assert played.demand.stands("m", "chat")
    played.clock.now += DEMAND_LIFE_S
    played.review(model())
    assert len(played.demand) == 0
    assert played.calls == 1


def test_a_demand_ends_when_it_is_met_or_its_model_has_gone() -> None:
    played = Played()
    for part in ("chat", "embedding"):
        played.demand.ask(model(), part)
    played.review(model(CHAT))
    assert not played.demand.stands("m", "chat")
    assert played.demand.stands("m", "embedding")
    played.review(model(parts=("whole",)))
    assert len(played.demand) == 0
    played.demand.ask(model(), "chat")
    played.review()
    assert len(played.demand) == 0


def test_a_process_lost_while_somebody_waits_for_it_is_a_demand_without_a_new_request() -> None:
    played = Played()
    waiting: Callable[[str, str], int] = lambda _name, part: int(part == "chat")  # noqa: E731
    played.review(model(CHAT), waiting=waiting)
    assert played.calls == 0  # busy is no demand
    played.review(model(), waiting=waiting)
    assert (played.calls, played.demand.stands("m", "chat"), played.demand.stands("m", "embedding")) == (1, True, False)


def test_what_only_remote_servers_have_cannot_be_wanted() -> None:
    played = Played()
    remote = model(CHAT, parts=(), local=False)
    played.demand.ask(remote, remote.part(EMBEDDINGS))
    assert (played.calls, len(played.demand)) == (0, 0)


# --- what loads say ----------------------------------------------------------------------------------------------------


def progress(**changes: Any) -> LoadProgress:
    base: LoadProgress = {"state": "loading", "progress": 0.4, "eta_s": 12.3, "detail": "", "at": time.time()}
    return {**base, **changes}  # type: ignore[typeddict-item]


SOMEBODY = KeyRecord(
    1, b"", "ast", 1, "sam", frozenset({"inference"}), None, None, True, None, None, None, None, "normal", 1.0, False
)


def said(value: object) -> LoadProgress | None:
    loads = Loads(lambda: 1000.0)
    loads.take_over({load_field("m", "chat").encode(): json.dumps(value).encode()})
    assert loads.find("m", "embedding") is None
    return loads.find("m", "chat")


def test_a_load_is_told_as_it_was_written_until_it_is_old() -> None:
    fresh = progress(at=1000.0 - LOAD_LIFE_S)
    assert said(fresh) == fresh
    assert said(progress(at=999.9 - LOAD_LIFE_S)) is None


@pytest.mark.parametrize("value", [None, 7, [], {}, {"state": "dancing", "at": 1000}, progress(at="now"), progress(at=None)])
def test_what_cannot_be_understood_says_nothing(value: object) -> None:
    assert said(value) is None


def test_numbers_that_are_none_do_no_harm() -> None:
    odd = said(progress(progress=7, eta_s=float("nan"), detail=None, at=1000))
    assert odd == {"state": "loading", "progress": 1.0, "eta_s": None, "detail": "", "at": 1000.0}
    late = said(progress(progress=True, eta_s=-3, at=1000))
    assert late is not None
    assert (late["progress"], late["eta_s"]) == (0.0, 0.0)
    loads = Loads()
    loads.take_over({load_field("m", "chat").encode(): b"\xff{"})
    assert loads.find("m", "chat") is None


@pytest.mark.parametrize(("eta_s", "told"), [(40.0, b"40"), (900.0, b"60"), (None, b"1")])
async def test_who_finds_the_queue_of_a_loading_model_full_comes_back_when_it_is_loaded(eta_s: float | None, told: bytes) -> None:
    slots, loads, asked = Slots(), Loads(), model()
    for _ in range(QUEUE_AT_LEAST):
        assert slots.enqueue(asked, Waiter(CHAT, lambda _: None, lambda _: None))
    loads.take_over({load_field("m", "chat").encode(): json.dumps(progress(eta_s=eta_s)).encode()})
    room = WaitingRoom(slots, Demand(lambda: None), loads)
    with pytest.raises(ApiError) as refused:
        await room.wait(asked, CHAT, (), asyncio.get_running_loop().time() + 60, SOMEBODY)
    assert (refused.value.code, dict(refused.value.headers)[b"retry-after"]) == ("server_overloaded", told)


# --- in a running gateway ----------------------------------------------------------------------------------------------


@pytest.fixture
async def heard(live: Redis) -> AsyncIterator[PubSub]:
    """Subscribed to demand, as the control plane is."""
    async with live.pubsub(ignore_subscribe_messages=True) as pubsub:
        await pubsub.subscribe(DEMAND)
        await pubsub.get_message(timeout=5)
        yield pubsub


async def next_demand(heard: PubSub) -> str:
    """Which gateway calls; the test's time-out bounds the wait."""
    while True:
        message = await heard.get_message(timeout=1)
        if message is not None:
            return str(message["data"])


async def more_demands(heard: PubSub, live: Redis) -> int:
    """How many more have come by now: everything before a message of our own."""
    await live.publish(DEMAND, "enough")
    count = 0
    while await next_demand(heard) != "enough":
        count += 1
    return count


async def part_of(gateway: Served, live: Redis, name: str = "tiny", part: str = "chat") -> PartTelemetry:
    return (await telemetry(gateway, live))["models"][name][part]


async def write_load(live: Redis, name: str = "tiny", **changes: Any) -> None:
    await live.hset(LOADS, load_field(name, "chat"), json.dumps(progress(**changes)))


def code_of(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


async def good(peer: Peer) -> None:
    await peer.read_request()
    peer.write(response(b'{"choices": []}'))


async def test_who_waits_a_second_is_told_how_the_load_is_getting_on(
    cast: Cast, serve: Serve, broker: Valkey, live: Redis, heard: PubSub
) -> None:
    await in_database(cast.model)
    gateway = await serve(redis_url=broker_url(broker))
    call = asyncio.create_task(gateway.chat(headers={"prefer": "wait=1"}))
    assert await next_demand(heard) == gateway.gateway.id
    wanted = await part_of(gateway, live)  # it stood there before the call for the control plane
    assert (wanted["wanted"], wanted["queued"]) == (True, 1)
    await write_load(live)
    reply = await call
    assert code_of(reply) == (503, "model_loading")
    assert reply.json()["loading"] == {"state": "loading", "progress": 0.4, "eta_s": 12.3}
    assert reply.headers["retry-after"] == "13"
    assert "about 13 s" in reply.json()["error"]["message"]
    assert gateway.idle()


async def test_who_waits_is_served_when_the_model_comes(
    cast: Cast, serve: Serve, engine: Engine, broker: Valkey, live: Redis, heard: PubSub
) -> None:
    upstream = await engine(good)
    row = await in_database(cast.model)
    gateway = await serve(redis_url=broker_url(broker))
    calls = [asyncio.create_task(gateway.chat()), asyncio.create_task(gateway.chat(stream=True))]
    await next_demand(heard)
    instance = await in_database(lambda: cast.instance(row, None, State.STARTING))
    await live.publish(EVENTS, '{"type": "revision"}')
    await until(lambda: gateway.gateway.directory.models["tiny"].state == "loading")
    assert not any(call.done() for call in calls)
    await in_database(lambda: Instance.objects.filter(pk=instance.pk).update(state=State.READY, port=upstream.port))
    await live.publish(EVENTS, '{"type": "revision"}')
    assert (await calls[0]).status_code == 200
    await calls[1]
    while (await part_of(gateway, live))["wanted"]:  # met, so it ends at once
        await asyncio.sleep(0.01)
    assert len(gateway.gateway.demand) == 0
    assert await more_demands(heard, live) == 0
    assert gateway.idle()


async def test_a_hundred_waiters_call_once_and_leave_no_demand_behind_when_the_model_goes(
    cast: Cast, serve: Serve, broker: Valkey, live: Redis, heard: PubSub
) -> None:
    await in_database(cast.model)
    gateway = await serve(redis_url=broker_url(broker))
    calls = [asyncio.create_task(gateway.chat()) for _ in range(100)]
    await until(lambda: gateway.gateway.slots.queued("tiny", "chat") == 100)
    while (await part_of(gateway, live))["queued"] != 100:
        await asyncio.sleep(0.01)
    assert await more_demands(heard, live) == 1
    await in_database(lambda: ModelConfig.objects.all().delete())
    replies = await asyncio.gather(*calls)
    assert {code_of(reply) for reply in replies} == {(404, "model_not_found")}
    await until(lambda: len(gateway.gateway.demand) == 0)
    assert (await telemetry(gateway, live))["models"] == {}
    assert gateway.idle()


async def test_who_does_not_wait_at_all_has_asked_all_the_same(
    cast: Cast, serve: Serve, broker: Valkey, live: Redis, heard: PubSub
) -> None:
    await in_database(cast.model)
    gateway = await serve(redis_url=broker_url(broker))
    reply = await gateway.chat(headers={"prefer": "wait=0"})
    assert code_of(reply) == (503, "model_loading")
    assert reply.json()["loading"] == {"state": "starting", "progress": None, "eta_s": None}
    assert reply.headers["retry-after"] == "5"
    await next_demand(heard)
    assert await part_of(gateway, live) == {"queued": 0, "oldest_wait_s": 0.0, "wanted": True}
    await write_load(live, state="waiting", eta_s=None, detail="It waits for memory: needs 3 GiB, 2 GiB are free.")
    while "memory" not in (reply := await gateway.chat(headers={"prefer": "wait=0"})).text:
        await asyncio.sleep(0.05)
    assert reply.json()["loading"]["state"] == "waiting"
    assert reply.headers["retry-after"] == "5"
    message = "The model waits to be loaded. It waits for memory: needs 3 GiB, 2 GiB are free. Please try again shortly."
    assert reply.json()["error"]["message"] == message
    narrow, _ = await in_database(lambda: cast.key("narrow", models=["tiny"]))
    await gateway.gateway.feed.recheck()
    hidden = await gateway.chat(key=narrow, headers={"prefer": "wait=0"})
    assert hidden.json()["loading"]["state"] == "waiting"
    assert "GiB" not in hidden.text  # it may name a model this key must not know of


async def test_a_stream_that_waited_in_vain_is_told_in_band(
    cast: Cast, serve: Serve, broker: Valkey, live: Redis, heard: PubSub
) -> None:
    await in_database(cast.model)
    gateway = await serve(redis_url=broker_url(broker), patience=Patience(hold_s=0.05, ping_s=0.05))
    await write_load(live, progress=0.75)
    reply, text = await read_until_cut(gateway, headers={"prefer": "wait=1"})
    assert reply.status_code == 200
    assert text.startswith(": ping\n\n")
    told = payloads(text)[-1]
    assert told["error"]["code"] == "model_loading"
    assert told["loading"]["progress"] == 0.75


async def test_another_gateway_calls_anew_and_the_first_leaves_nothing(
    cast: Cast, serve: Serve, broker: Valkey, live: Redis, heard: PubSub
) -> None:
    await in_database(cast.model)
    first = await serve(redis_url=broker_url(broker))
    await first.chat(headers={"prefer": "wait=0"})
    assert await next_demand(heard) == first.gateway.id
    await first.gateway.link.stop()
    assert not await live.exists(telemetry_key(first.gateway.id))
    second = await serve(redis_url=broker_url(broker))
    assert (await part_of(second, live))["wanted"] is False
    call = asyncio.create_task(second.chat(headers={"prefer": "wait=1"}))
    assert await next_demand(heard) == second.gateway.id
    assert [key async for key in live.scan_iter(TELEMETRY_PATTERN)] == [telemetry_key(second.gateway.id)]
    await write_load(live)
    assert (await call).json()["loading"]["progress"] == 0.4


async def test_a_demand_made_while_valkey_was_away_is_told_when_it_is_back(cast: Cast, serve: Serve, broker: Valkey) -> None:
    await in_database(cast.model)
    with broker.running():
        gateway = await serve(redis_url=broker_url(broker))
    await until(lambda: gateway.gateway.link.up is False)
    reply = await gateway.chat(headers={"prefer": "wait=0"})
    assert code_of(reply) == (503, "model_loading")
    with broker.running():
        client = Redis.from_url(broker_url(broker), decode_responses=True)
        await until(lambda: gateway.gateway.link.up)
        assert (await part_of(gateway, client))["wanted"] is True
        await client.aclose()


async def test_two_parts_of_a_model_are_wanted_and_fail_apart(
    cast: Cast, serve: Serve, broker: Valkey, live: Redis, heard: PubSub
) -> None:
    def make() -> None:
        both = cast.model(engine="wasmedge", embedding_model_path="/models/embed.gguf")
        cast.instance(both, None, State.CRASH_LOOP, part="embedding", exit_reason="bad file")

    await in_database(make)
    gateway = await serve(redis_url=broker_url(broker))
    call = asyncio.create_task(gateway.chat(headers={"prefer": "wait=1"}))
    await next_demand(heard)
    assert (await part_of(gateway, live))["wanted"] is True
    assert (await part_of(gateway, live, part="embedding"))["wanted"] is False
    both = gateway.gateway.directory.models["tiny"]
    assert (both.failure(EMBEDDINGS), both.failure(CHAT)) == ("bad file", None)
    assert code_of(await call) == (503, "model_loading")


async def test_a_start_that_was_refused_is_told_at_once_also_to_who_waits_already(cast: Cast, serve: Serve) -> None:
    row = await in_database(cast.model)
    gateway = await serve()
    admin, _ = await in_database(lambda: cast.key("admin", scopes=["admin", "inference"]))
    await gateway.gateway.feed.recheck()
    waiting = [asyncio.create_task(gateway.chat()), asyncio.create_task(gateway.chat(key=admin))]
    await until(lambda: gateway.gateway.slots.queued("tiny", "chat") == 2)
    reason = "It needs 9 GiB and the node has 4 GiB; a ctx_size of 2048 would fit."
    refused = await in_database(lambda: cast.instance(row, None, State.FAILED, pid=None, diagnosis="memory", exit_reason=reason))
    plain, told = await asyncio.gather(*waiting)
    assert code_of(plain) == code_of(told) == (503, "model_failed")
    assert "GiB" not in plain.text
    assert reason in told.text
    assert code_of(await gateway.chat()) == (503, "model_failed")
    await in_database(lambda: Instance.objects.filter(pk=refused.pk).update(diagnosis="crashed"))  # its next try will come
    await until(lambda: gateway.gateway.directory.models["tiny"].state == "loading")
    assert code_of(await gateway.chat(headers={"prefer": "wait=0"})) == (503, "model_loading")
