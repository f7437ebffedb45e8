"""One word for how a model is doing, from what is wanted and what is there."""

from __future__ import annotations

import pytest

from models_app.model_status import Condition, judge
from models_app.models import Instance, State


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
