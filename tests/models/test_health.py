"""What is well, busy, sick or dead: the judgement, exhaustively."""

from __future__ import annotations

import itertools

import pytest

from models_app.contracts.coordination import GatewayTelemetry
from models_app.engines.base import Health, Probe
from models_app.health import FAILED_PROBES, STILL_S, Traffic, Verdict, judge, traffic_of

IDLE = Traffic(known=True)
WORKING = Traffic(known=True, in_flight=1, last_byte_s=0.5)
SILENT_WORK = Traffic(known=True, in_flight=1, last_byte_s=600.0)
UNKNOWN = Traffic(known=False)


@pytest.mark.parametrize(
    ("health", "traffic", "failed_before", "verdict"),
    [
        (Health.READY, IDLE, 99, Verdict.WELL),
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


@pytest.mark.parametrize(
    ("traffic", "still_s", "verdict"),
    [
        (SILENT_WORK, STILL_S - 1, Verdict.BUSY),
        (SILENT_WORK, STILL_S, Verdict.SICK),
        (UNKNOWN, STILL_S, Verdict.SICK),
        (WORKING, STILL_S, Verdict.BUSY),
    ],
)
def test_one_that_works_and_does_not_compute_is_sick_after_a_while(traffic: Traffic, still_s: float, verdict: Verdict) -> None:
    assert judge(True, Probe(Health.BUSY), traffic, 0, still_s) == verdict


@pytest.mark.parametrize(("health", "traffic"), list(itertools.product(Health, [IDLE, WORKING, UNKNOWN])))
def test_a_dead_process_is_dead_whatever_was_heard_of_it(health: Health, traffic: Traffic) -> None:
    assert judge(False, Probe(health), traffic, 0) == Verdict.DEAD


@pytest.mark.parametrize("failed_before", range(10))
def test_a_process_that_sent_bytes_a_moment_ago_is_never_ended(failed_before: int) -> None:
    for health in Health:
        assert judge(True, Probe(health), WORKING, failed_before) in (Verdict.WELL, Verdict.BUSY)


def gateway(name: str, in_flight: int, last_byte_s: float | None) -> GatewayTelemetry:
    row = {"in_flight": in_flight, "last_byte_s": last_byte_s, "last_end_s": None}
    return {"gateway": name, "node": "n", "instances": {"7:1": row}, "models": {}}  # type: ignore[dict-item]


def test_traffic_is_the_sum_over_gateways_and_the_youngest_byte() -> None:
    assert traffic_of("7:1", [gateway("a", 2, None), gateway("b", 1, 3.0), gateway("c", 0, 9.0)]) == Traffic(True, 3, 3.0)


def test_traffic_of_another_generation_does_not_count() -> None:
    assert traffic_of("7:2", [gateway("a", 2, 0.1)]) == Traffic(True, 0, None)


def test_without_any_gateway_the_traffic_is_unknown_and_not_idle() -> None:
    assert traffic_of("7:1", []) == Traffic(known=False)
