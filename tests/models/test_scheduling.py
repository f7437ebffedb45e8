"""Deciding from rows and telemetry on a real Valkey; the gateways are emulated by writing what they would write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.utils import timezone
from pytest_django.fixtures import Settings

from models_app import coordination, reconcile, scheduling
from models_app.contracts.coordination import TELEMETRY_LIFE_MS, USE_LIFE_MS, telemetry_key, use_key
from models_app.models import Cause, Instance, ModelConfig, State
from models_app.scheduler import PRESSED_S, Target
from tests.models.instances import make_instance, make_model

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def clean(valkey: str) -> Iterator[None]:
    yield
    for key in coordination.client().scan_iter(match="assistant:*"):
        coordination.client().delete(key)


def gateway_says(name: str, instances: dict[str, Any] | None = None, **models: Any) -> None:
    """What a gateway would write once a second; models: name=(queued, wanted) of the chat part."""
    parts = {
        model: {"chat": {"queued": queued, "oldest_wait_s": 0.0, "wanted": wanted}} for model, (queued, wanted) in models.items()
    }
    rows = {
        key: {"in_flight": in_flight, "last_byte_s": None, "last_end_s": end, "silent_s": None}
        for key, (in_flight, end) in (instances or {}).items()
    }
    said = {"gateway": name, "node": "n", "instances": rows, "models": parts}
    coordination.client().set(telemetry_key(name), json.dumps(said), px=TELEMETRY_LIFE_MS * 10)


def gateway_holds(instance: Instance, name: str) -> None:
    coordination.client().set(use_key(instance.pk, instance.generation, name), "1", px=USE_LIFE_MS * 10)


def decide(now: datetime | None = None) -> dict[str, Target]:
    """Targets by part of the one model there is, or by its name where there are several."""
    models = list(ModelConfig.objects.all())
    found = scheduling.decide(models, list(Instance.objects.current()), scheduling.traffic(), now or timezone.now())
    names = {model.pk: model.name for model in models}
    return {part if len(models) == 1 else names[pk]: target for (pk, part), target in found.items()}


class TestDemand:
    def test_what_a_gateway_wants_is_started(self) -> None:
        make_model(min_replicas=0)
        gateway_says("gw-a")
        gateway_says("gw-b", smol=(0, True))
        assert decide() == {"chat": Target(1, "demand", wanted=True)}

    def test_parts_are_wanted_one_by_one(self) -> None:
        make_model(min_replicas=0, embedding_model_path="embed.gguf")
        gateway_says("gw-a", smol=(2, True))
        assert decide() == {"chat": Target(1, "demand", wanted=True), "embedding": Target(0, "minimum")}

    def test_a_disabled_model_is_not_started_for_anybody(self) -> None:
        make_model(enabled=False)
        gateway_says("gw-a", smol=(2, True))
        assert decide()["chat"].replicas == 0

    def test_what_waits_for_room_goes_when_nobody_asks_any_more(self) -> None:
        make_instance(State.PENDING, make_model(min_replicas=0), cause=Cause.DEMAND, hold="memory")
        gateway_says("gw-a", smol=(1, True))
        assert decide()["chat"].replicas == 1
        gateway_says("gw-a", smol=(0, False))
        assert decide()["chat"].replicas == 0

    def test_what_was_started_by_hand_waits_on(self) -> None:
        make_instance(State.PENDING, make_model(min_replicas=0), cause=Cause.MANUAL, hold="memory")
        gateway_says("gw-a", smol=(0, False))
        assert decide()["chat"].replicas == 1


class TestScale:
    def test_queues_of_all_gateways_call_for_one_more_after_a_while(self) -> None:
        ready = make_instance(State.READY, make_model(max_replicas=2), slots=4)
        gateway_says("gw-a", {scheduling.key_of(ready): (2, None)})
        gateway_says("gw-b", {scheduling.key_of(ready): (2, None)})
        now = timezone.now()
        counts = [decide(now + timedelta(seconds=2 * look))["chat"].replicas for look in range(8)]
        assert counts.index(2) == PRESSED_S / 2

    def test_a_replacement_does_not_count_beside_what_it_replaces(self) -> None:
        old = make_instance(State.READY, make_model(max_replicas=3))
        make_instance(State.STARTING, replaces=old)
        gateway_says("gw-a")
        assert decide()["chat"].replicas == 1
        Instance.objects.filter(pk=old.pk).update(state=State.DRAINING)
        assert decide()["chat"].replicas == 1

    def test_without_valkey_the_number_stays_within_its_bounds(self, settings: Settings) -> None:
        model = make_model(min_replicas=0, max_replicas=2, idle_timeout_s=1)
        make_instance(State.READY, model, ready_at=timezone.now() - timedelta(hours=1))
        settings.REDIS_URL = "unix:///nonexistent/valkey.sock"
        coordination.client.cache_clear()
        found = decide()
        coordination.client.cache_clear()
        assert found == {"chat": Target(1, "demand")}


class TestIdleness:
    @pytest.fixture
    def idle(self) -> Instance:
        """READY for an hour, time-out a minute, no request ever."""
        model = make_model(min_replicas=0, idle_timeout_s=60)
        return make_instance(State.READY, model, ready_at=timezone.now() - timedelta(hours=1))

    def test_one_that_was_never_used_goes_after_its_time_out(self, idle: Instance) -> None:
        gateway_says("gw-a")
        gateway_holds(idle, "gw-a")
        assert decide()["chat"].replicas == 0

    @pytest.mark.parametrize(("in_flight", "end", "stays"), [(1, 600.0, True), (0, 59.0, True), (0, 61.0, False)])
    def test_the_time_counts_from_the_end_of_the_last_request(
        self, idle: Instance, in_flight: int, end: float, stays: bool
    ) -> None:
        gateway_says("gw-a", {scheduling.key_of(idle): (0, None)})
        gateway_says("gw-b", {scheduling.key_of(idle): (in_flight, end)})
        assert decide()["chat"].replicas == stays

    def test_a_use_before_every_gateway_was_restarted_is_remembered(self, idle: Instance) -> None:
        gateway_says("gw-a", {scheduling.key_of(idle): (0, 50.0)})
        decide()
        assert Instance.objects.get().last_used_at is not None
        gateway_says("gw-a", {scheduling.key_of(idle): (0, None)})
        assert decide()["chat"].replicas == 1

    def test_a_gateway_that_is_missing_may_be_busy(self, idle: Instance) -> None:
        assert decide()["chat"].replicas == 1
        gateway_says("gw-a")
        gateway_holds(idle, "gw-b")
        assert decide()["chat"].replicas == 1
        gateway_says("gw-b")
        assert decide()["chat"].replicas == 0

    def test_another_generation_of_it_does_not_matter(self, idle: Instance) -> None:
        gateway_says("gw-a", {f"{idle.pk}:{idle.generation + 1}": (3, None)})
        assert decide()["chat"].replicas == 0

    def test_pinned_models_stay(self, idle: Instance) -> None:
        ModelConfig.objects.update(pinned=True)
        gateway_says("gw-a")
        assert decide()["chat"].replicas == 1

    def test_the_last_use_is_noted_now_and_then_only(self, idle: Instance, django_assert_num_queries: Any) -> None:
        gateway_says("gw-a", {scheduling.key_of(idle): (0, 30.0)})
        seen, now, instances = scheduling.traffic(), timezone.now(), list(Instance.objects.all())
        with django_assert_num_queries(1):
            scheduling.decide([], instances, seen, now)
            scheduling.decide([], instances, seen, now + timedelta(seconds=9))
        assert instances[0].last_used_at == now - timedelta(seconds=30)
        with django_assert_num_queries(1):
            scheduling.decide([], instances, seen, now + timedelta(seconds=11))


def test_use_of_an_instance_is_what_all_gateways_see_together() -> None:
    now = timezone.now()
    ready = make_instance(State.READY, ready_at=now - timedelta(seconds=100))
    assert scheduling.use_of(ready, scheduling.traffic(), now) == scheduling.Use(False, 0, ready.ready_at)
    gateway_says("gw-a", {scheduling.key_of(ready): (1, 20.0)})
    gateway_says("gw-b", {scheduling.key_of(ready): (2, 40.0)})
    use = scheduling.use_of(ready, scheduling.traffic(), now)
    assert use == scheduling.Use(True, 3, now - timedelta(seconds=20))
    assert use.idle_s(now) == 0.0
    assert scheduling.Use(True, 0, use.last_at).idle_s(now) == 20.0
    assert scheduling.Use(False, 0, use.last_at).idle_s(now) is None
    assert scheduling.Use(True, 0, None).idle_s(now) is None


def test_what_the_scheduler_remembers_does_not_outlive_its_model() -> None:
    model = make_model()
    decide()
    assert list(coordination.read_hash(scheduling.MEMORY)) == ["smol\nchat"]
    model.delete()
    decide()
    assert coordination.read_hash(scheduling.MEMORY) == {}


def test_what_is_started_by_hand_during_a_round_is_not_one_too_many() -> None:
    model = make_model(min_replicas=0)
    targets, seen, now = {(model.pk, "chat"): Target(0)}, scheduling.traffic(), timezone.now()
    manual = make_instance(State.PENDING, model, cause=Cause.MANUAL)
    assert reconcile.observe(targets, seen, now, set()).instances == []
    [found] = reconcile.observe(targets, seen, now, {manual.pk}).instances
    assert found.instance_id == manual.pk
