"""The scheduler is pure: every rule by example, and what must always hold over simulated hours (an emulation of a part whose
processes take a while to load, whose load is given as the number of requests that run or wait, and which is looked at
every two seconds).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, strategies
from hypothesis import settings as hypothesis_settings

from models_app.scheduler import LONGEST_STEP_S, PRESSED_S, SLACK_S, Hysteresis, PartView, Replica, Target, target

IDLE = Replica(ready=True, slots=2, idle_s=0.0)
FULL = Replica(ready=True, slots=2, in_flight=2, idle_s=0.0)
LOADING = Replica(ready=False, slots=2)
PART = PartView(min_replicas=1, max_replicas=3)
PERIOD_S = 2.0


def now(view: PartView) -> Target:
    """The target at the very first look."""
    return target(view, Hysteresis(), 0.0)[0]


def after(view: PartView, seconds: float) -> Target:
    """The target when a view has been the same for so long."""
    found, seen = target(view, Hysteresis(), 0.0)
    moment = 0.0
    while moment < seconds and found.replicas == len(view.replicas):
        moment += PERIOD_S
        found, seen = target(view, seen, moment)
    return found


def test_a_disabled_model_has_no_process_whatever_is_asked() -> None:
    view = replace(PART, enabled=False, replicas=[IDLE, LOADING], queued=3, wanted=True)
    assert now(view) == Target(0, "minimum", wanted=False)


@pytest.mark.parametrize(("replicas", "wanted"), [(0, 2), (1, 2), (2, 2), (3, 3), (4, 4), (5, 4)])
def test_the_number_stays_within_minimum_and_maximum(replicas: int, wanted: int) -> None:
    view = PartView(2, 4, [replace(IDLE, in_flight=1)] * replicas)
    assert now(view).replicas == wanted


def test_one_is_started_where_somebody_asks_and_nothing_is_there() -> None:
    asleep = PartView(0, 2)
    assert now(asleep) == Target(0, "minimum")
    assert now(replace(asleep, wanted=True)) == Target(1, "demand", wanted=True)
    assert now(replace(asleep, wanted=True, known=False)) == Target(1, "demand", wanted=True)
    assert now(replace(asleep, wanted=True, replicas=[LOADING])) == Target(1, "demand", wanted=True)


def test_a_minimum_that_is_asked_for_is_wanted_too() -> None:
    assert now(replace(PART, wanted=True)) == Target(1, "minimum", wanted=True)


class TestPressure:
    @pytest.mark.parametrize("view", [replace(PART, replicas=[IDLE], queued=1), replace(PART, replicas=[FULL])])
    def test_one_more_once_it_has_held(self, view: PartView) -> None:
        assert after(view, PRESSED_S - PERIOD_S) == Target(1, "minimum")
        assert after(view, PRESSED_S) == Target(2, "scale")

    def test_nearly_full_is_full(self) -> None:
        assert after(replace(PART, replicas=[Replica(True, 10, 9)]), 3600.0).replicas == 2
        assert after(replace(PART, replicas=[Replica(True, 10, 8)]), 3600.0).replicas == 1

    def test_not_above_the_maximum(self) -> None:
        assert after(replace(PART, replicas=[FULL] * 3, queued=9), 3600.0).replicas == 3

    @pytest.mark.parametrize("other", [LOADING, Replica(ready=False)])
    def test_not_while_one_is_on_its_way_or_has_failed(self, other: Replica) -> None:
        assert after(replace(PART, replicas=[FULL, other], queued=9), 3600.0).replicas == 2

    def test_a_moment_without_it_starts_the_time_anew(self) -> None:
        pressed, calm = replace(PART, replicas=[FULL]), replace(PART, replicas=[replace(FULL, in_flight=1)])
        seen = Hysteresis()
        for look in range(100):
            found, seen = target(calm if look % 5 == 4 else pressed, seen, look * PERIOD_S)
            assert found.replicas == 1

    def test_what_is_not_known_does_not_hinder_growth(self) -> None:
        assert after(replace(PART, replicas=[FULL], known=False), PRESSED_S).replicas == 2


class TestSlack:
    QUIET = replace(PART, replicas=[replace(IDLE, in_flight=1), IDLE])

    def test_one_fewer_once_it_has_held(self) -> None:
        assert after(self.QUIET, SLACK_S - PERIOD_S).replicas == 2
        assert after(self.QUIET, SLACK_S).replicas == 1

    def test_not_where_the_load_would_not_fit_easily_into_the_rest(self) -> None:
        assert after(replace(self.QUIET, replicas=[replace(IDLE, in_flight=1)] * 2), 3600.0).replicas == 2
        assert after(replace(self.QUIET, queued=1), 3600.0).replicas >= 2

    def test_never_the_last_one(self) -> None:
        assert after(PartView(0, 3, [IDLE]), 3600.0).replicas == 1
        assert after(PartView(2, 3, [IDLE] * 2), 3600.0).replicas == 2

    @pytest.mark.parametrize("changes", [{"known": False}, {"wanted": True}])
    def test_not_on_a_guess(self, changes: dict[str, bool]) -> None:
        assert after(replace(self.QUIET, **changes), 3600.0).replicas == 2  # type: ignore[arg-type]

    def test_a_largest_process_is_the_one_counted_on_least(self) -> None:
        assert after(replace(PART, replicas=[Replica(True, 8, 2), Replica(True, 1, 0)]), 3600.0).replicas == 2

    def test_one_that_is_not_ready_takes_no_slots_with_it(self) -> None:
        assert after(replace(PART, replicas=[replace(FULL, in_flight=1), LOADING]), SLACK_S).replicas == 1


class TestIdleness:
    ASLEEP = PartView(0, 3, [replace(IDLE, idle_s=300.0)], idle_timeout_s=300.0)

    def test_the_last_one_goes_after_the_time_out(self) -> None:
        assert now(self.ASLEEP) == Target(0, "minimum")
        assert now(replace(self.ASLEEP, replicas=[replace(IDLE, idle_s=299.0)])).replicas == 1

    def test_all_go_down_to_the_minimum_at_once(self) -> None:
        idle = [replace(IDLE, idle_s=400.0)] * 3
        assert now(replace(self.ASLEEP, replicas=idle)).replicas == 0
        assert now(replace(self.ASLEEP, replicas=idle, min_replicas=2)).replicas == 2

    def test_one_alone_goes_while_others_work(self) -> None:
        mixed = [replace(IDLE, in_flight=1), replace(IDLE, idle_s=400.0)]
        assert now(replace(self.ASLEEP, replicas=mixed)).replicas == 1

    def test_none_goes_that_would_be_called_back_at_once(self) -> None:
        assert now(replace(self.ASLEEP, replicas=[FULL, replace(IDLE, idle_s=400.0)])).replicas == 2

    @pytest.mark.parametrize(
        "changes", [{"pinned": True}, {"idle_timeout_s": 0.0}, {"known": False}, {"queued": 1}, {"wanted": True}]
    )
    def test_it_stays(self, changes: dict[str, object]) -> None:
        assert now(replace(self.ASLEEP, **changes)).replicas == 1  # type: ignore[arg-type]

    @pytest.mark.parametrize("replica", [LOADING, replace(IDLE, idle_s=None), replace(IDLE, in_flight=1, idle_s=400.0)])
    def test_what_loads_or_works_or_may_work_is_not_idle(self, replica: Replica) -> None:
        assert now(replace(self.ASLEEP, replicas=[replica])).replicas == 1


class TestForgotten:
    WAITING = PartView(0, 2, [Replica(ready=False, for_requests=True)])

    def test_what_waits_for_room_is_dropped_when_nobody_asks_any_more(self) -> None:
        assert now(replace(self.WAITING, wanted=True)).replicas == 1
        assert now(self.WAITING).replicas == 0
        assert now(replace(self.WAITING, known=False)).replicas == 1
        assert now(replace(self.WAITING, min_replicas=1)).replicas == 1

    def test_what_an_administrator_started_waits_on(self) -> None:
        assert now(replace(self.WAITING, replicas=[Replica(ready=False)])).replicas == 1


def test_a_clock_that_is_set_makes_no_moment_an_hour() -> None:
    pressed = replace(PART, replicas=[FULL])
    _, seen = target(pressed, Hysteresis(), 1000.0)
    found, seen = target(pressed, seen, 1_000_000.0)
    assert (found.replicas, seen.pressed_s) == (1, LONGEST_STEP_S)
    found, seen = target(pressed, seen, 5.0)
    assert (found.replicas, seen.pressed_s) == (1, LONGEST_STEP_S)


# Over time


@dataclass
class Part:
    """An emulated part: what the scheduler wants is carried out, and a new process is READY load_s later."""

    minimum: int
    maximum: int
    slots: int
    load_s: float = 0.0
    idle_timeout_s: float = 0.0
    born: list[float] = field(default_factory=list)  # when each process was started
    used: list[float] = field(default_factory=list)  # when each was last of use
    seen: Hysteresis = field(default_factory=Hysteresis)

    def look(self, load: int, at: float) -> int:
        """One round under so many requests; the number of processes after it."""
        ready = [at - born >= self.load_s for born in self.born]
        running, replicas = load, []
        for number, one_ready in enumerate(ready):
            taken = min(running, self.slots) if one_ready else 0
            running -= taken
            if taken or not one_ready:
                self.used[number] = at
            replicas.append(Replica(one_ready, self.slots, taken, at - self.used[number] if one_ready else None))
        wanted = running > 0 and not any(ready)
        view = PartView(self.minimum, self.maximum, replicas, idle_timeout_s=self.idle_timeout_s, queued=running, wanted=wanted)
        found, self.seen = target(view, self.seen, at)
        assert self.minimum <= found.replicas <= self.maximum
        self._carry_out(found.replicas, at)
        return len(self.born)

    def _carry_out(self, wanted: int, at: float) -> None:
        """The last in the list has the least to do, so it goes first."""
        del self.born[wanted:], self.used[wanted:]
        while len(self.born) < wanted:
            self.born.append(at)
            self.used.append(at)


def watch(part: Part, load: Callable[[float], int], seconds: float, start: float = 0.0) -> Iterator[int]:
    for look in range(int(seconds / PERIOD_S)):
        moment = start + look * PERIOD_S
        yield part.look(load(moment), moment)


PARTS = strategies.builds(
    lambda minimum, room, slots, load_s, idle: Part(minimum, max(1, minimum + room), slots, load_s, idle),
    strategies.integers(0, 3),
    strategies.integers(0, 4),
    strategies.integers(1, 8),
    strategies.sampled_from([0.0, 3.0, 40.0]),
    strategies.sampled_from([0.0, 1.0, 30.0, 300.0]),
)


@hypothesis_settings(max_examples=80, deadline=None)
@given(part=PARTS, load=strategies.integers(0, 40))
def test_under_constant_load_the_number_settles(part: Part, load: int) -> None:
    counts = list(watch(part, lambda _: load, 2400.0))
    assert len(set(counts[-400:])) == 1


@hypothesis_settings(max_examples=80, deadline=None)
@given(part=PARTS, load=strategies.integers(1, 40))
def test_a_load_that_fits_into_the_maximum_is_served_in_the_end(part: Part, load: int) -> None:
    counts = list(watch(part, lambda _: load, 2400.0))
    assert counts[-1] == part.maximum or counts[-1] * part.slots >= load


@hypothesis_settings(max_examples=80, deadline=None)
@given(
    low=strategies.integers(0, 6),
    high=strategies.integers(0, 12),
    half=strategies.sampled_from([2.0, 4.0, 6.0, 8.0]),
    replicas=strategies.integers(1, 3),
)
def test_a_load_that_changes_faster_than_the_windows_moves_nothing(low: int, high: int, half: float, replicas: int) -> None:
    """A wave between a load that calls for more and one that does not, or for fewer and not: too short for either."""
    part = Part(1, 4, slots=2, born=[-1000.0] * replicas, used=[0.0] * replicas)
    slots = 2 * replicas
    loads = sorted((low, high))
    fits = [load <= 0.6 * (slots - 2) for load in loads]
    calls = [load >= 0.9 * slots for load in loads]
    if all(calls) or all(fits) or not (any(calls) or any(fits)):
        return
    counts = list(watch(part, lambda moment: loads[int(moment / half) % 2], 1200.0))
    assert set(counts) == {replicas}


@hypothesis_settings(max_examples=60, deadline=None)
@given(part=PARTS, loads=strategies.lists(strategies.integers(0, 40), min_size=20, max_size=200))
def test_whatever_comes_the_bounds_hold(part: Part, loads: list[int]) -> None:
    for look, load in enumerate(loads):
        part.look(load, look * PERIOD_S)  # asserts them


def test_a_working_day() -> None:
    """Nothing, a crowd, a few, nothing: up to what the crowd needs, down to what the few need, then away."""
    part = Part(0, 3, slots=2, load_s=4.0, idle_timeout_s=300.0)
    assert set(watch(part, lambda _: 0, 100.0)) == {0}
    assert list(watch(part, lambda _: 6, 120.0, start=100.0))[-1] == 3
    assert list(watch(part, lambda _: 1, 240.0, start=220.0))[-1] == 1
    assert list(watch(part, lambda _: 0, 240.0, start=460.0))[-1] == 1
    assert list(watch(part, lambda _: 0, 120.0, start=700.0))[-1] == 0
