"""The transition table, the back-off, and that nobody acts on an old view."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from django.db import IntegrityError
from django.utils import timezone
from pytest_django.fixtures import Settings

from models_app import backoff, lifecycle
from models_app.contracts.diagnoses import Code
from models_app.diagnosis import Exit
from models_app.exceptions import StaleTransition
from models_app.models import DrainReason, Instance, State
from models_app.process_identity import ProcessIdentity
from tests.models.instances import make_claim, make_instance, make_model, make_node

pytestmark = pytest.mark.django_db

S = State
TRANSITIONS: dict[str, tuple[Callable[[Instance], None], State, set[State]]] = {
    "starting": (lambda one: lifecycle.starting(one, make_claim()), S.STARTING, {S.PENDING, S.FAILED}),
    "ready": (lifecycle.ready, S.READY, {S.STARTING}),
    "draining": (lifecycle.draining, S.DRAINING, {S.READY}),
    "undrained": (lifecycle.undrained, S.READY, set()),  # what it takes is tried below
    "held": (lambda one: lifecycle.held(one, "memory", "It waits.", wanted=False), S.PENDING, {S.PENDING, S.FAILED}),
    "fenced": (lambda one: lifecycle.fenced(one, "Fenced."), S.STOPPED, set(State) - {S.STOPPED}),
    "stopping": (lifecycle.stopping, S.STOPPING, {S.STARTING, S.READY, S.DRAINING}),
    "stopped": (lifecycle.stopped, S.STOPPED, {S.PENDING, S.FAILED, S.CRASH_LOOP, S.STOPPING}),
    "failed": (lambda one: lifecycle.failed(one, Exit("It died.")), S.FAILED, {S.STARTING, S.READY}),
    "refused": (lambda one: lifecycle.refused(one, "No file.", "d"), S.FAILED, {S.PENDING, S.FAILED}),
    "reset": (lifecycle.reset, S.PENDING, {S.FAILED, S.CRASH_LOOP}),
}


@pytest.mark.parametrize("name", TRANSITIONS)
@pytest.mark.parametrize("before", list(State))
def test_a_transition_works_from_its_own_states_and_no_other(name: str, before: State) -> None:
    act, after, allowed = TRANSITIONS[name]
    # pid and port, as whatever had a process keeps them
    instance = make_instance(before, port=20_001, pid=2**22 + 1, start_ticks=1)
    if before in allowed:
        act(instance)
        assert instance.state == after
    else:
        with pytest.raises(StaleTransition):
            act(instance)
    assert Instance.objects.get().state == (after if before in allowed else before)


def test_who_acts_on_an_old_state_changes_nothing() -> None:
    mine = make_instance(S.STARTING, port=20_001, pid=7, start_ticks=1)
    others = Instance.objects.get()
    lifecycle.stopping(others)
    with pytest.raises(StaleTransition, match="no longer STARTING"):
        lifecycle.ready(mine)
    assert Instance.objects.get().state == S.STOPPING


def test_who_acts_on_an_old_generation_changes_nothing() -> None:
    mine = make_instance(S.FAILED)
    others = Instance.objects.get()
    lifecycle.starting(others, make_claim())
    lifecycle.failed(others, Exit("It died."))
    with pytest.raises(StaleTransition, match="generation 0"):
        lifecycle.starting(mine, make_claim(port=20_002))
    assert Instance.objects.get().generation == 1


def test_every_process_is_a_new_generation_without_traces_of_the_last() -> None:
    instance = make_instance(S.FAILED, generation=4, pid=7, start_ticks=1, exit_signal=9, peak_memory_bytes=1)
    lifecycle.starting(instance, make_claim())
    fresh = Instance.objects.get()
    assert (fresh.generation, fresh.pid, fresh.exit_signal, fresh.peak_memory_bytes) == (5, None, None, None)
    assert fresh.deadline_at is not None


def test_two_processes_of_a_node_never_get_the_same_port() -> None:
    first, second = make_instance(), make_instance()
    lifecycle.starting(first, make_claim(port=20_005))
    with pytest.raises(IntegrityError):
        lifecycle.starting(second, make_claim(port=20_005))


def test_recording_a_process_is_refused_once_the_generation_has_passed() -> None:
    instance = make_instance(S.STARTING, generation=1)
    Instance.objects.update(generation=2)
    with pytest.raises(StaleTransition):
        lifecycle.spawned(instance, ProcessIdentity("boot", 7, 1), ProcessIdentity("boot", 6, 1))


def test_the_back_off_doubles_up_to_five_minutes_after_an_immediate_first_restart() -> None:
    assert [backoff.delay_s(n) for n in range(1, 9)] == [0, 10, 20, 40, 80, 160, 300, 300]
    assert backoff.delay_s(10_000) == 300


def test_a_try_is_due_at_its_time_and_where_the_clock_was_set_back_behind_it() -> None:
    now = timezone.now()
    ages = {-1: True, 0: True, 1: False, 299: False, 300: False, 301: True, 4 * 3600: True}
    assert {age: backoff.due(now + timedelta(seconds=age), now) for age in ages} == ages
    assert not backoff.due(None, now)


@pytest.mark.parametrize("reason", [DrainReason.EVICT, DrainReason.YIELD])
def test_a_drain_that_only_makes_room_can_be_called_off_and_the_process_goes_on(reason: DrainReason) -> None:
    instance = make_instance(S.READY, generation=3, ready_at=timezone.now() - timedelta(minutes=5))
    ready_at = instance.ready_at
    lifecycle.draining(instance, reason, "Unloaded to make room for x.")
    lifecycle.undrained(instance)
    fresh = Instance.objects.get()
    assert (fresh.state, fresh.generation, fresh.ready_at, fresh.deadline_at) == (S.READY, 3, ready_at, None)
    assert (fresh.drain_reason, fresh.drain_detail) == ("", "")


def test_a_stop_is_not_called_off() -> None:
    instance = make_instance(S.READY)
    lifecycle.draining(instance)
    with pytest.raises(StaleTransition):
        lifecycle.undrained(instance)


def test_who_stops_an_instance_that_makes_room_stops_it_for_good_whoever_calls_the_drain_off() -> None:
    instance = make_instance(S.READY)
    lifecycle.draining(instance, DrainReason.EVICT)
    others = Instance.objects.get()
    lifecycle.draining(instance)
    with pytest.raises(StaleTransition):
        lifecycle.undrained(others)
    assert (Instance.objects.get().state, Instance.objects.get().drain_reason) == (S.DRAINING, DrainReason.STOP)


def test_what_is_held_back_knows_since_when_it_is_wanted() -> None:
    instance = make_instance()
    lifecycle.held(instance, "memory", "In the way: x.", wanted=True)
    since = instance.wanted_since
    lifecycle.held(instance, "memory", "In the way: y.", wanted=True)
    fresh = Instance.objects.get()
    assert (fresh.hold, fresh.hold_reason, fresh.wanted_since) == ("memory", "In the way: y.", since)
    lifecycle.held(instance, "memory", "In the way: y.", wanted=False)
    assert Instance.objects.get().wanted_since is None


def test_what_starts_is_held_back_no_more() -> None:
    instance = make_instance(hold="memory", hold_reason="In the way: x.", wanted_since=timezone.now())
    lifecycle.starting(instance, make_claim())
    fresh = Instance.objects.get()
    assert (fresh.hold, fresh.hold_reason, fresh.wanted_since) == ("", "", None)


def test_a_taken_port_is_no_reason_to_wait(settings: Settings) -> None:
    settings.ASSISTANT_ENGINE_TRIES = 3
    instance = make_instance(S.STARTING, failures=1)
    lifecycle.failed(instance, Exit("Its port was taken.", diagnosis=Code.PORT_TAKEN))
    assert (instance.state, instance.failures) == (S.FAILED, 2)
    assert instance.next_attempt_at is not None
    assert instance.next_attempt_at <= timezone.now()


def test_a_first_failure_is_tried_again_at_once() -> None:
    instance = make_instance(S.READY, ready_at=timezone.now() - timedelta(seconds=1))
    lifecycle.failed(instance, Exit("It died.", "last line", None, 9, 123))
    fresh = Instance.objects.get()
    assert fresh.next_attempt_at is not None
    assert fresh.next_attempt_at <= timezone.now()
    assert (fresh.failures, fresh.exit_reason, fresh.exit_log, fresh.exit_signal) == (1, "It died.", "last line", 9)


def test_a_second_failure_within_a_minute_waits() -> None:
    instance = make_instance(S.READY, ready_at=timezone.now() - timedelta(seconds=5), failures=1)
    lifecycle.failed(instance, Exit("It died again."))
    assert instance.next_attempt_at is not None
    assert instance.next_attempt_at > timezone.now() + timedelta(seconds=5)


def test_a_stable_minute_makes_the_next_failure_a_first_one() -> None:
    instance = make_instance(S.READY, ready_at=timezone.now() - timedelta(seconds=61), failures=4)
    lifecycle.failed(instance, Exit("It died after long."))
    assert (instance.state, instance.failures) == (S.FAILED, 1)


def test_an_engine_that_was_ready_long_ago_but_not_this_time_gets_no_credit_for_it() -> None:
    instance = make_instance(S.STARTING, ready_at=timezone.now() - timedelta(hours=1), failures=2)
    lifecycle.failed(instance, Exit("It died."))
    assert instance.failures == 3


def test_too_many_failures_in_a_row_are_a_crash_loop(settings: Settings) -> None:
    settings.ASSISTANT_ENGINE_TRIES = 3
    instance = make_instance(S.STARTING, failures=2)
    lifecycle.failed(instance, Exit("It died."))
    assert (instance.state, instance.failures, instance.next_attempt_at) == (S.CRASH_LOOP, 3, None)


def test_a_refused_start_is_tried_for_ever_but_never_in_a_hurry() -> None:
    instance = make_instance()
    for _ in range(12):
        lifecycle.refused(instance, "There is no file x.gguf.", "d")
        assert instance.state == S.FAILED
        assert instance.next_attempt_at is not None
        assert instance.next_attempt_at > timezone.now() + timedelta(seconds=9)
    assert instance.generation == 0


def test_refused_starts_use_up_none_of_the_engine_s_tries(settings: Settings) -> None:
    settings.ASSISTANT_ENGINE_TRIES = 3
    instance = make_instance()
    for _ in range(5):
        lifecycle.refused(instance, "Port 20001 is in use by another program.", "d")
    lifecycle.starting(instance, make_claim())
    lifecycle.failed(instance, Exit("It died."))
    assert (instance.state, instance.failures) == (S.FAILED, 1)


def test_a_reset_forgets_the_failures() -> None:
    instance = make_instance(S.CRASH_LOOP, failures=5, launch_digest="old")
    lifecycle.reset(instance)
    assert (instance.state, instance.failures, instance.launch_digest) == (S.PENDING, 0, "")


def test_becoming_ready_clears_what_was_said_of_the_last_failure() -> None:
    instance = make_instance(S.STARTING, port=20_001, pid=7, start_ticks=1, exit_reason="It died.", exit_log="x")
    lifecycle.ready(instance)
    fresh = Instance.objects.get()
    assert (fresh.exit_reason, fresh.exit_log, fresh.deadline_at) == ("", "", None)
    assert fresh.ready_at is not None


def test_a_new_instance_waits_and_knows_its_model_by_name() -> None:
    instance = lifecycle.create(make_model("other", slots=3, ctx_size=777), make_node(), "chat")
    assert (instance.state, instance.model_name, instance.slots, instance.ctx_size) == (S.PENDING, "other", 3, 777)
