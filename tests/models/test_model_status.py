"""One word for how a model is doing, from what is wanted and what is there."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from models_app import loads
from models_app.model_status import Condition, judge, status_of, with_current_instances
from models_app.models import Instance, Load, ModelConfig, State
from tests.models.instances import make_instance, make_model


def some(*states: State) -> list[Instance]:
    return [Instance(pk=number, state=state, exit_reason=f"why {number}") for number, state in enumerate(states, 1)]


@pytest.mark.parametrize(
    ("enabled", "wanted", "states", "condition"),
    [
        (True, 1, [State.READY], Condition.READY),
        (True, 1, [State.READY, State.FAILED], Condition.READY),
        (True, 2, [State.READY], Condition.DEGRADED),
        (True, 2, [State.READY, State.STARTING], Condition.DEGRADED),
        (True, 1, [State.STARTING], Condition.LOADING),
        (True, 1, [State.PENDING], Condition.LOADING),
        (True, 1, [], Condition.LOADING),
        (True, 0, [], Condition.IDLE),
        (True, 0, [State.READY], Condition.READY),
        (True, 1, [State.FAILED], Condition.FAILED),
        (True, 1, [State.CRASH_LOOP, State.STARTING], Condition.FAILED),
        (False, 1, [], Condition.STOPPED),
        (False, 1, [State.READY], Condition.STOPPING),
    ],
)
def test_the_condition_follows(enabled: bool, wanted: int, states: list[State], condition: Condition) -> None:
    assert judge(enabled, wanted, some(*states)).condition == condition


def test_the_reason_and_the_instance_of_a_failure_are_told() -> None:
    status = judge(True, 2, some(State.READY, State.FAILED))
    assert (status.ready, status.desired, status.reason, status.failed_instance) == (1, 2, "why 2", 2)


def test_a_disabled_model_wants_nothing() -> None:
    status = judge(False, 3, some(State.FAILED))
    assert (status.desired, status.failed_instance) == (0, None)


def test_a_model_that_no_node_takes_says_so() -> None:
    assert "cordoned" in judge(True, 1, []).reason
    assert judge(True, 1, [Instance(state=State.PENDING)]).reason == ""
    assert judge(False, 1, []).reason == ""


@pytest.mark.django_db
def test_every_part_counts() -> None:
    model = make_model(embedding_model_path="embed.gguf", min_replicas=1)
    make_instance(State.READY, model)
    status = status_of(model)
    assert (status.condition, status.ready, status.desired) == (Condition.DEGRADED, 1, 2)


@pytest.mark.django_db
class TestActivity:
    def told(self) -> str:
        """The same, whether the model came alone or on a page."""
        [model] = with_current_instances(ModelConfig.objects.all())
        assert status_of(model) == status_of(ModelConfig.objects.get())
        return status_of(model).activity

    def test_an_idle_model_loads_when_asked(self) -> None:
        make_model(min_replicas=0)
        assert self.told() == "loads when asked"

    @pytest.mark.usefixtures("valkey")
    def test_a_load_says_how_far_it_is_or_what_it_waits_for(self) -> None:
        model = make_model(embedding_model_path="embed.gguf")
        make_instance(State.STARTING, model, generation=1, started_at=timezone.now() - timedelta(seconds=4))
        make_instance(State.PENDING, model, part="embedding", hold="memory", hold_reason="It needs 8 GiB, 3 GiB are free.")
        loads.follow({})
        Load.objects.filter(part="chat").update(expected_s=1.0)
        told = self.told()
        assert told == "loading 95 %, longer than usual · embedding waits for memory: It needs 8 GiB, 3 GiB are free."

    def test_one_that_is_served_or_stopped_has_nothing_to_tell(self) -> None:
        make_instance(State.READY)
        assert self.told() == ""
        ModelConfig.objects.update(enabled=False)
        assert self.told() == ""

    def test_a_page_of_models_costs_two_queries_more(self, django_assert_num_queries: Any) -> None:
        for number in range(5):
            make_model(f"m{number}", min_replicas=0)
        with django_assert_num_queries(3):
            told = {status_of(model).activity for model in with_current_instances(ModelConfig.objects.all())}
        assert told == {"loads when asked"}
