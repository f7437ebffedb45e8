"""What is well, busy, wedged, sick or dead: the judgement, exhaustively."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, strategies

from models_app.contracts.coordination import GatewayTelemetry
from models_app.engines.base import Health, Probe
from models_app.health_verdict import FAILED_PROBES, Patience, Signs, Track, Traffic, Verdict, follow, judge, stuck, traffic_of

IDLE = Traffic(known=True)
WORKING = Traffic(known=True, in_flight=1, last_byte_s=0.5)
SILENT_WORK = Traffic(known=True, in_flight=1, last_byte_s=600.0)
UNKNOWN = Traffic(known=False)
PATIENCE = Patience(still_s=120.0, request_s=600.0)


@pytest.mark.parametrize(
    ("health", "traffic", "failed_before", "verdict"),
    [
        (Health.READY, IDLE, 99, Verdict.WELL),
        (Health.READY, UNKNOWN, 99, Verdict.WELL),
        (Health.READY, WORKING, 99, Verdict.BUSY),
        (Health.READY, SILENT_WORK, 99, Verdict.BUSY),
        (Health.BUSY, WORKING, 99, Verdict.BUSY),
        (Health.BUSY, SILENT_WORK, 99, Verdict.BUSY),
        (Health.BUSY, UNKNOWN, 99, Verdict.BUSY),
        (Health.BUSY, IDLE, 0, Verdict.SUSPECT),
        (Health.BUSY, IDLE, FAILED_PROBES - 2, Verdict.SUSPECT),
        (Health.BUSY, IDLE, FAILED_PROBES - 1, Verdict.SICK),
        (Health.UNREACHABLE, IDLE, 0, Verdict.SUSPECT),
        (Health.UNREACHABLE, IDLE, FAILED_PROBES - 1, Verdict.SICK),
        (Health.UNREACHABLE, UNKNOWN, FAILED_PROBES - 1, Verdict.SICK),
        (Health.UNREACHABLE, WORKING, FAILED_PROBES - 1, Verdict.BUSY),
        (Health.WRONG_SERVER, IDLE, FAILED_PROBES - 1, Verdict.SICK),
        (Health.LOADING, IDLE, FAILED_PROBES - 1, Verdict.SICK),
    ],
)
def test_the_verdict_on_a_living_process(health: Health, traffic: Traffic, failed_before: int, verdict: Verdict) -> None:
    assert judge(True, Probe(health), traffic, failed_before) == verdict


@pytest.mark.parametrize("health", [Health.READY, Health.BUSY, Health.UNREACHABLE])
def test_work_that_gets_nowhere_is_wedged_whether_it_answers_probes_or_not(health: Health) -> None:
    assert judge(True, Probe(health), SILENT_WORK, 0, wedged=True) == Verdict.WEDGED
    assert judge(True, Probe(health), WORKING, 0, wedged=True) != Verdict.WEDGED


def test_work_that_only_the_engine_knows_of_counts() -> None:
    assert judge(True, Probe(Health.READY, slots_busy=1), IDLE, 0) == Verdict.BUSY
    assert judge(True, Probe(Health.READY, slots_busy=1), IDLE, 0, wedged=True) == Verdict.WEDGED
    assert judge(True, Probe(Health.READY, slots_busy=0), IDLE, 0, wedged=True) == Verdict.WELL


@pytest.mark.parametrize(("health", "traffic"), list(itertools.product(Health, [IDLE, WORKING, UNKNOWN])))
def test_a_dead_process_is_dead_whatever_was_heard_of_it(health: Health, traffic: Traffic) -> None:
    assert judge(False, Probe(health), traffic, 0) == Verdict.DEAD


@pytest.mark.parametrize(("failed_before", "wedged"), list(itertools.product(range(10), [False, True])))
def test_a_process_that_sent_bytes_a_moment_ago_is_never_ended(failed_before: int, wedged: bool) -> None:
    for health in Health:
        assert judge(True, Probe(health), WORKING, failed_before, wedged) == Verdict.BUSY


def looks(*signs: Signs) -> Track:
    track: Track | None = None
    for one in signs:
        track = follow(track, one)
    assert track is not None
    return track


def test_work_without_bytes_or_computing_is_stuck_after_a_while() -> None:
    track = looks(Signs(0.0, "a", 5.0, None), Signs(119.0, "a", 5.05, None))
    assert not stuck(track, 119.0, PATIENCE)
    assert stuck(track, 120.0, PATIENCE)


def test_work_that_computes_is_given_the_longer_time() -> None:
    track = looks(*(Signs(float(now), "a", float(now), None) for now in range(0, 600, 5)))
    assert not stuck(track, 599.0, PATIENCE)
    assert track.silent_s(599.0) == 599.0
    assert stuck(track, 600.0, PATIENCE)


def test_a_movement_of_the_slots_is_progress() -> None:
    track = looks(Signs(0.0, "a", 0.0, None), Signs(100.0, "b", 0.0, None))
    assert track.silent_s(150.0) == 50.0
    assert not stuck(track, 219.0, PATIENCE)


def test_an_engine_that_stops_telling_of_its_slots_has_not_progressed() -> None:
    track = looks(Signs(0.0, "a", 0.0, None), Signs(50.0, "", 0.0, None), Signs(100.0, "a", 0.0, None))
    assert track.silent_s(100.0) == 100.0


def test_a_byte_at_a_gateway_is_progress() -> None:
    track = looks(Signs(0.0, "", 0.0, None), Signs(100.0, "", 0.0, 95.0))
    assert track.silent_s(100.0) == 5.0


def test_what_was_never_looked_at_is_not_stuck() -> None:
    assert not stuck(None, 1e9, PATIENCE)


def test_probing_it_does_not_count_as_its_computing() -> None:
    track = looks(*(Signs(float(now), "a", now * 0.005, None) for now in range(0, 125, 5)))
    assert stuck(track, 125.0, PATIENCE)


@given(
    strategies.lists(
        strategies.tuples(
            strategies.floats(0.1, 30.0), strategies.sampled_from(["", "a", "b"]), strategies.floats(0, 5), strategies.booleans()
        ),
        min_size=1,
        max_size=40,
    )
)
def test_times_never_run_backwards_and_a_fresh_look_is_never_stuck(steps: list[tuple[float, str, float, bool]]) -> None:
    now = cpu = 0.0
    track: Track | None = None
    for pause, work, spent, byte in steps:
        before = track
        now, cpu = now + pause, cpu + spent
        track = follow(track, Signs(now, work, cpu, now if byte else None))
        assert 0.0 <= track.still_s(now) <= track.silent_s(now)
        if byte or before is None:
            assert not stuck(track, now, PATIENCE)


def gateway(name: str, in_flight: int, last_byte_s: float | None) -> GatewayTelemetry:
    row = {"in_flight": in_flight, "last_byte_s": last_byte_s, "last_end_s": None}
    return {"gateway": name, "node": "n", "instances": {"7:1": row}, "models": {}}  # type: ignore[dict-item]


def test_traffic_is_the_sum_over_gateways_and_the_youngest_byte() -> None:
    assert traffic_of("7:1", [gateway("a", 2, None), gateway("b", 1, 3.0), gateway("c", 0, 9.0)]) == Traffic(True, 3, 3.0)


def test_traffic_of_another_generation_does_not_count() -> None:
    assert traffic_of("7:2", [gateway("a", 2, 0.1)]) == Traffic(True, 0, None)


def test_without_any_gateway_the_traffic_is_unknown_and_not_idle() -> None:
    assert traffic_of("7:1", []) == Traffic(known=False)
