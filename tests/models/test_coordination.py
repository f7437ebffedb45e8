"""Leases and what gateways and nodes say, on a real Valkey; and what happens without one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from pytest_django.fixtures import Settings
from redis.client import PubSub

from models_app import coordination
from models_app.contracts.coordination import EVENTS, PREFIX, USE_LIFE_MS, telemetry_key, use_key
from models_app.exceptions import CoordinationUnavailable

LIFE_MS = 60_000


@pytest.fixture
def clean(valkey: str) -> Iterator[None]:
    yield
    for key in coordination.client().scan_iter(match="assistant:*"):
        coordination.client().delete(key)


@pytest.fixture
def absent(settings: Settings) -> Iterator[None]:
    """No Valkey at all."""
    settings.REDIS_URL = "unix:///nonexistent/valkey.sock"
    coordination.client.cache_clear()
    yield
    coordination.client.cache_clear()


@pytest.mark.usefixtures("clean")
class TestWithValkey:
    def test_a_lease_has_one_holder_until_it_is_released(self) -> None:
        lease = coordination.acquire("job", LIFE_MS)
        assert lease is not None
        assert coordination.acquire("job", LIFE_MS) is None
        assert coordination.holder("job") == lease.token
        lease.release()
        assert coordination.holder("job") is None
        assert coordination.acquire("job", LIFE_MS) is not None

    def test_leases_of_different_names_do_not_touch(self) -> None:
        assert coordination.acquire("one", LIFE_MS) is not None
        assert coordination.acquire("other", LIFE_MS) is not None

    def test_who_lost_a_lease_can_neither_renew_nor_release_it(self) -> None:
        lost = coordination.acquire("job", LIFE_MS)
        assert lost is not None
        lost.release()
        held = coordination.acquire("job", LIFE_MS)
        assert held is not None
        assert not lost.renew(LIFE_MS)
        lost.release()
        assert coordination.holder("job") == held.token
        assert held.renew(LIFE_MS)

    def test_users_are_the_gateways_that_hold_this_generation(self) -> None:
        for key in (use_key(7, 2, "gw-a"), use_key(7, 2, "gw-b"), use_key(7, 1, "gw-c"), use_key(77, 2, "gw-d")):
            coordination.client().set(key, "1", px=USE_LIFE_MS)
        assert coordination.users(7, 2) == ["gw-a", "gw-b"]
        assert coordination.users(8, 1) == []

    def test_telemetry_is_what_every_gateway_said_last(self) -> None:
        assert coordination.telemetry() == []
        said = {"gateway": "gw-a", "node": "n", "instances": {}, "models": {}}
        coordination.client().set(telemetry_key("gw-a"), json.dumps(said), px=5000)
        assert coordination.telemetry() == [said]

    def test_nodes_are_heard_one_by_one(self) -> None:
        coordination.node_beat("a", LIFE_MS)
        assert coordination.beating_nodes(["a", "b"]) == {"a"}
        assert coordination.beating_nodes([]) == set()

    def test_failed_probes_are_counted_until_one_succeeds(self) -> None:
        assert [coordination.count_probe_failure(7, 1, LIFE_MS) for _ in range(2)] == [1, 2]
        assert coordination.count_probe_failure(7, 2, LIFE_MS) == 1
        coordination.forget_probe_failures(7, 1)
        assert coordination.count_probe_failure(7, 1, LIFE_MS) == 1

    def test_holders_are_told_of_all_instances_at_once(self) -> None:
        assert coordination.use_holders() == {}
        for key in (use_key(7, 2, "gw-a"), use_key(7, 2, "gw:b"), use_key(8, 1, "gw-a")):
            coordination.client().set(key, "1", px=USE_LIFE_MS)
        assert coordination.use_holders() == {"7:2": {"gw-a", "gw:b"}, "8:1": {"gw-a"}}

    def test_a_hash_is_replaced_whole_and_forgotten_in_the_end(self) -> None:
        name = f"{PREFIX}some-hash"
        assert coordination.read_hash(name) == {}
        coordination.replace_hash(name, {"a": 1, "b": [None, 2.5]}, LIFE_MS)
        coordination.replace_hash(name, {"b\nc": {"d": "ü"}}, LIFE_MS)
        assert coordination.read_hash(name) == {"b\nc": {"d": "ü"}}
        assert 0 < coordination.client().pttl(name) <= LIFE_MS
        coordination.set_in_hash(name, "a", 7, 2 * LIFE_MS)
        assert coordination.read_hash(name) == {"b\nc": {"d": "ü"}, "a": 7}
        assert LIFE_MS < coordination.client().pttl(name) <= 2 * LIFE_MS
        coordination.replace_hash(name, {}, LIFE_MS)
        assert coordination.read_hash(name) == {}

    def test_a_revision_hint_reaches_who_listens(self) -> None:
        with PubSub(coordination.client().connection_pool) as listener:
            listener.subscribe(EVENTS)
            assert listener.get_message(timeout=5)["type"] == "subscribe"
            coordination.publish_revision()
            assert json.loads(listener.get_message(timeout=5)["data"]) == {"type": "revision"}


@pytest.mark.usefixtures("absent")
@pytest.mark.parametrize(
    "ask",
    [
        lambda: coordination.acquire("job", LIFE_MS),
        lambda: coordination.holder("job"),
        lambda: coordination.users(1, 1),
        lambda: coordination.telemetry(),
        lambda: coordination.use_holders(),
        lambda: coordination.read_hash("assistant:some-hash"),
        lambda: coordination.replace_hash("assistant:some-hash", {}, LIFE_MS),
        lambda: coordination.set_in_hash("assistant:some-hash", "a", 1, LIFE_MS),
        lambda: coordination.beating_nodes(["a"]),
        lambda: coordination.node_beat("a", LIFE_MS),
        lambda: coordination.count_probe_failure(1, 1, LIFE_MS),
        lambda: coordination.Lease("job", "token").renew(LIFE_MS),
    ],
)
def test_without_valkey_whoever_asks_is_told_that_nobody_knows(ask: Callable[[], object]) -> None:
    with pytest.raises(CoordinationUnavailable, match="does not answer"):
        ask()


@pytest.mark.usefixtures("absent")
def test_without_valkey_hints_and_releases_are_silent() -> None:
    coordination.publish_revision()
    coordination.Lease("job", "token").release()
