"""Who is unloaded for whom: real toy engines that do not fit together, and a gateway's word for who uses them.

The gateway and the passing of time are emulated (tests/models/world.py, tests/fakes/spoken_gateway.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_django.fixtures import Settings

from models_app import admitting, coordination, lifecycle, operations, provisioning
from models_app.contracts.coordination import use_key
from models_app.engines.registry import ENGINES
from models_app.models import DrainReason, Incident, Instance, ModelConfig, Node, State
from tests.fakes import gguf_files
from tests.models.toy import ToyEngine
from tests.models.world import World, settings_for

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("valkey")]

READY, PENDING, DRAINING, STARTING = State.READY, State.PENDING, State.DRAINING, State.STARTING


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, settings: Settings, tmp_path: Path) -> Iterator[World]:
    monkeypatch.setitem(ENGINES, "toy", ToyEngine)
    settings_for(tmp_path, settings)
    for name in ("a", "b", "c"):
        gguf_files.llama(tmp_path / f"{name}.gguf")
    world = World()
    yield world
    world.close()


def on_demand(world: World, name: str, **fields: Any) -> ModelConfig:
    """A model that runs only while somebody asks for it, on a file of its own."""
    return world.model(name, chat_model_path=f"{name}.gguf", min_replicas=0, **fields)


def room_for(world: World, model: ModelConfig, share: float) -> None:
    world.limit_memory(int(world.need(model) * share))


def loaded(world: World, name: str) -> Instance:
    """Ask for it, have it loaded and answered, and let it be idle for a minute."""
    world.gateway.begin(name)
    world.until(lambda: world.states(name) == [READY])
    world.gateway.end_all()
    world.pass_time(60)
    return world.one(name)


def test_what_fits_runs_side_by_side(world: World) -> None:
    a = on_demand(world, "a")
    on_demand(world, "b")
    room_for(world, a, 2.5)
    loaded(world, "a")
    assert loaded(world, "b").memory_bytes
    assert world.states("a") == [READY]


def test_an_idle_model_is_unloaded_for_one_that_is_asked_for(world: World) -> None:
    a = on_demand(world, "a")
    on_demand(world, "b")
    room_for(world, a, 1.5)
    first = loaded(world, "a")
    world.gateway.begin("b")
    world.round()
    assert (world.states("a"), world.states("b")) == ([DRAINING], [PENDING])
    waiting = world.one("b")
    assert waiting.hold == "memory"
    assert "after unloading a (idle" in waiting.hold_reason
    assert waiting.wanted_since is not None
    world.until(lambda: world.states("b") == [READY])
    first.refresh_from_db()
    assert (first.state, first.exit_reason) == (State.STOPPED, "Unloaded to make room for b.")
    assert world.one("b").hold == ""


def test_a_busy_model_is_never_unloaded_and_the_wait_is_explained(world: World) -> None:
    a = on_demand(world, "a")
    on_demand(world, "b")
    room_for(world, a, 1.5)
    loaded(world, "a")
    world.gateway.begin("a")
    world.gateway.begin("b")
    for _ in range(5):
        world.round()
        world.pass_time(1)
    assert world.states("a") == [READY]
    assert world.one("b").hold_reason.endswith("in the way: a (busy).")


def test_a_minimum_alone_unloads_nobody(world: World) -> None:
    a = on_demand(world, "a")
    room_for(world, a, 1.5)
    loaded(world, "a")
    world.model("b", chat_model_path="b.gguf")
    for _ in range(5):
        world.round()
        world.pass_time(30)
    assert (world.states("a"), world.states("b")) == ([READY], [PENDING])
    assert world.one("b").hold == "memory"


def test_who_starts_a_model_by_hand_may_have_an_idle_one_unloaded(world: World) -> None:
    a = on_demand(world, "a")
    room_for(world, a, 1.5)
    loaded(world, "a")
    b = world.model("b", chat_model_path="b.gguf")
    world.round()
    assert world.states("b") == [PENDING]
    operations.start_model(b)
    world.until(lambda: world.states("b") == [READY])
    assert world.states("a") == []


def test_a_kept_model_that_was_unloaded_comes_back_when_there_is_room(world: World) -> None:
    a = world.model("a", chat_model_path="a.gguf")
    on_demand(world, "b", idle_timeout_s=100)
    room_for(world, a, 1.5)
    world.until(lambda: world.states("a") == [READY])
    world.pass_time(60)
    loaded(world, "b")
    assert world.states("a") == [PENDING]
    world.pass_time(100)  # and with that b has been idle for too long
    world.until(lambda: world.states("a") == [READY])
    assert world.states("b") == []


def test_a_pinned_model_stays_whoever_asks(world: World) -> None:
    a = on_demand(world, "a", pinned=True)
    on_demand(world, "b")
    room_for(world, a, 1.5)
    loaded(world, "a")
    world.gateway.begin("b")
    world.round()
    refused = world.one("b")
    assert (world.states("a"), refused.state, refused.diagnosis) == ([READY], State.FAILED, "memory")
    assert "beside a (pinned)" in refused.exit_reason
    assert Incident.objects.get().diagnosis == "memory"


def test_what_can_never_fit_is_refused_with_the_numbers(world: World) -> None:
    a = on_demand(world, "a")
    room_for(world, a, 0.5)
    world.gateway.begin("a")
    world.round()
    assert world.one("a").state == State.FAILED
    assert "It does not fit: needs" in world.one("a").exit_reason
    world.limit_memory(None)
    world.until(lambda: world.states("a") == [READY])


def test_one_that_was_just_loaded_is_not_unloaded_again_at_once(world: World) -> None:
    a = on_demand(world, "a")
    on_demand(world, "b")
    room_for(world, a, 1.5)
    world.gateway.begin("a")
    world.until(lambda: world.states("a") == [READY], seconds=0.0)
    world.gateway.end_all()
    world.gateway.begin("b")
    world.round()
    assert world.states("a") == [READY]
    assert "just loaded" in world.one("b").hold_reason
    world.until(lambda: world.states("b") == [READY])


def test_an_unload_is_called_off_when_a_request_comes_back_meanwhile(world: World) -> None:
    a = on_demand(world, "a")
    on_demand(world, "b")
    room_for(world, a, 1.5)
    first = loaded(world, "a")
    world.gateway.begin("b")
    world.round()
    assert world.states("a") == [DRAINING]
    world.gateway.begin("a")  # finds nothing ready, so it waits
    assert provisioning.advance(world.one("a")) is None
    first.refresh_from_db()
    assert (first.state, first.generation, first.drain_reason) == (READY, 1, "")
    world.gateway.look()
    assert world.gateway.in_flight[first.pk, 1] == 1


def test_an_unload_is_called_off_where_a_gateway_still_uses_the_process_at_its_end(world: World) -> None:
    on_demand(world, "a")
    instance = loaded(world, "a")
    world.gateway.begin("a")
    lifecycle.draining(instance, DrainReason.EVICT)
    assert provisioning.advance(instance) is not None
    world.pass_time(lifecycle.EVICT_GRACE_S)
    assert provisioning.advance(world.one("a")) is None
    assert world.states("a") == [READY]


def test_a_process_with_requests_is_not_ended_although_its_gateway_has_lost_its_use_key(world: World) -> None:
    on_demand(world, "a")
    instance = loaded(world, "a")
    world.gateway.begin("a")
    lifecycle.draining(instance, DrainReason.YIELD)
    coordination.client().delete(use_key(instance.pk, 1, world.gateway.name))
    world.pass_time(5)
    assert provisioning.advance(world.one("a")) is not None
    assert world.states("a") == [DRAINING]


def test_nothing_is_unloaded_while_no_gateway_is_heard(world: World) -> None:
    on_demand(world, "a")
    instance = loaded(world, "a")
    lifecycle.draining(instance, DrainReason.EVICT)
    world.gateway.vanish()
    world.pass_time(5)
    assert provisioning.advance(world.one("a")) is not None
    world.pass_time(lifecycle.EVICT_GRACE_S)
    assert provisioning.advance(world.one("a")) is None
    assert world.states("a") == [READY]


def test_whoever_waits_for_long_gets_the_room_of_the_one_loaded_first_once_its_requests_end(world: World) -> None:
    a = on_demand(world, "a")
    for name in ("b", "c"):
        on_demand(world, name)
    room_for(world, a, 2.5)
    first = loaded(world, "a")
    loaded(world, "b")
    world.gateway.begin("a")
    world.gateway.begin("b")
    world.gateway.begin("c")
    world.round()
    world.pass_time(admitting.STARVED.total_seconds())
    world.round()
    assert (world.states("a"), world.states("b"), world.states("c")) == ([DRAINING], [READY], [PENDING])
    assert "a makes room once its running requests have ended" in world.one("c").hold_reason
    for _ in range(3):  # it goes on answering, and nobody else is asked to go
        world.pass_time(60)
        world.round()
    assert (world.states("a"), world.states("b")) == ([DRAINING], [READY])
    world.gateway.end((first.pk, 1))
    world.until(lambda: world.states("c") == [READY])
    assert world.states("b") == [READY]


def test_whoever_waits_for_long_gets_the_room_of_one_that_is_asked_for_again_and_again(world: World) -> None:
    """Between two short requests it is idle, and each time its unload has begun the next request calls that off."""
    a = on_demand(world, "a")
    on_demand(world, "b")
    room_for(world, a, 1.5)
    first = loaded(world, "a")
    world.gateway.begin("b")

    def short_requests_go_on() -> bool:
        if world.states("a") == [DRAINING]:
            world.gateway.begin("a")
            provisioning.advance(world.one("a"))  # looked at again long before the next round
            world.gateway.look()
        world.gateway.end((first.pk, 1))
        return world.states("b") == [READY]

    world.until(short_requests_go_on)


def test_one_that_cannot_end_its_requests_in_time_goes_on(world: World) -> None:
    on_demand(world, "a")
    instance = loaded(world, "a")
    world.gateway.begin("a")
    lifecycle.draining(instance, DrainReason.YIELD)
    world.pass_time(lifecycle.YIELD_GRACE_S)
    assert provisioning.advance(world.one("a")) is None
    assert world.states("a") == [READY]


@pytest.mark.parametrize(("reason", "after"), [(DrainReason.STOP, []), (DrainReason.YIELD, [READY])])
def test_a_drain_comes_to_its_end_although_the_clock_was_set_back_meanwhile(
    world: World, reason: DrainReason, after: list[State]
) -> None:
    """Its gateway works on, so that only the time can end the drain; the moments on record are hours ahead by then."""
    model = on_demand(world, "a")
    instance = loaded(world, "a")
    world.gateway.begin("a")
    lifecycle.draining(instance, reason)
    world.pass_time(-4 * 3600)
    if reason == DrainReason.STOP:
        operations.stop_model(model)
    world.until(lambda: world.states("a") == after)


def test_a_model_of_higher_priority_makes_no_room_for_a_lower_one(world: World) -> None:
    a = on_demand(world, "a", priority=5)
    on_demand(world, "b")
    room_for(world, a, 1.5)
    loaded(world, "a")
    world.gateway.begin("a")
    world.gateway.begin("b")
    for _ in range(3):
        world.round()
        world.pass_time(60)
    assert world.states("a") == [READY]


def test_room_that_was_made_goes_to_whoever_has_waited_longest(world: World) -> None:
    a = on_demand(world, "a")
    for name in ("b", "c"):
        on_demand(world, name)
    room_for(world, a, 1.5)
    loaded(world, "a")
    world.gateway.begin("c")
    world.round()
    assert (world.states("a"), world.states("c")) == ([DRAINING], [PENDING])
    world.gateway.begin("b")
    world.round()
    world.until(lambda: world.states("c") == [READY])
    assert world.states("b") == [PENDING]


def test_a_node_takes_no_more_processes_than_it_may(world: World) -> None:
    Node.objects.update(max_instances=1)
    on_demand(world, "a")
    world.model("b", chat_model_path="b.gguf")
    loaded(world, "b")
    world.gateway.begin("a")
    world.round()
    waiting = world.one("a")
    assert (waiting.hold, world.states("b")) == ("node_full", [DRAINING])
    assert "may run 1 (max_instances). It starts after unloading b." in waiting.hold_reason
    world.until(lambda: world.states("a") == [READY])
    assert world.one("b").hold == "node_full"


def test_a_full_node_replaces_in_place(world: World) -> None:
    Node.objects.update(max_instances=1)
    world.model("a", chat_model_path="a.gguf")
    world.until(lambda: world.states("a") == [READY])
    old = world.one("a")
    ModelConfig.objects.update(ctx_size=2048)
    world.until(lambda: world.states("a") == [READY] and world.one("a").ctx_size == 2048)
    old.refresh_from_db()
    assert (old.state, old.exit_reason) == (State.STOPPED, "Replaced because ctx_size 4096 → 2048.")


def test_a_pinned_model_that_fills_the_memory_is_replaced_in_place(world: World) -> None:
    a = world.model("a", chat_model_path="a.gguf", pinned=True)
    room_for(world, a, 1.5)
    world.until(lambda: world.states("a") == [READY])
    ModelConfig.objects.update(threads=2)
    world.until(lambda: world.states("a") == [READY] and world.one("a").launch["threads"] == 2)


def test_a_changed_configuration_is_served_without_a_gap(world: World) -> None:
    world.model("a", chat_model_path="a.gguf")
    world.until(lambda: world.states("a") == [READY])
    old = world.one("a")
    ModelConfig.objects.update(ctx_size=2048)

    def replaced() -> bool:
        assert READY in world.states("a")
        return Instance.objects.get(pk=old.pk).state == State.STOPPED

    world.until(replaced)
    assert world.one("a").replaces_id == old.pk
    assert len(world.engines()) == 1


def test_a_configuration_that_cannot_start_leaves_the_old_process_serving(world: World) -> None:
    world.model("a", chat_model_path="a.gguf")
    world.until(lambda: world.states("a") == [READY])
    ModelConfig.objects.update(extra_args={"behaviour": "exit"})
    world.until(lambda: world.states("a") == [State.CRASH_LOOP, READY], seconds=400)
    for _ in range(3):
        world.round()
        world.pass_time(60)
    assert world.states("a") == [State.CRASH_LOOP, READY]
    ModelConfig.objects.update(extra_args={"behaviour": "serve"})
    world.until(lambda: world.states("a") == [READY])
    assert Instance.objects.ready().get().generation == 1
