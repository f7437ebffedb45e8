"""Hearing demand, on a real Valkey. Waits are bounded polls; that nothing more comes is told by what comes last."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from pytest_django.fixtures import Settings

from models_app import coordination
from models_app.contracts.coordination import DEMAND
from models_app.demand import DemandListener

PATIENCE_S = 10.0


class Heard:
    """Counts the calls of a listener."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


def eventually(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + PATIENCE_S
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    return holds()


def say() -> None:
    coordination.client().publish(DEMAND, "smol")


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def listener(valkey: str, heard: Heard) -> Iterator[DemandListener]:
    """One that has connected, and called once for it."""
    listener = DemandListener(heard)
    listener.start()
    assert eventually(lambda: heard.calls == 1)
    yield listener
    listener.stop()
    listener.join(PATIENCE_S)
    assert not listener.is_alive()


@pytest.mark.usefixtures("listener")
def test_every_demand_is_answered(heard: Heard) -> None:
    for number in range(2, 5):
        say()
        assert eventually(lambda number=number: heard.calls >= number)  # type: ignore[misc]


@pytest.mark.usefixtures("listener")
def test_a_crowd_is_answered_as_one_or_two(heard: Heard) -> None:
    """One at once, one for those that came while that was under way."""
    holding = coordination.acquire("demand", 60_000)
    while holding is None:
        holding = coordination.acquire("demand", 60_000)
    for _ in range(100):
        say()
    assert heard.calls == 1
    holding.release()
    assert eventually(lambda: heard.calls == 2)
    # All hundred had been delivered by the time this one is.
    say()
    assert eventually(lambda: heard.calls >= 3)
    assert heard.calls <= 4


def test_two_listeners_do_not_silence_each_other(listener: DemandListener, heard: Heard) -> None:
    also = Heard()
    other = DemandListener(also)
    other.start()
    assert eventually(lambda: also.calls == 1)
    say()
    assert eventually(lambda: heard.calls >= 2 and also.calls >= 2)
    other.stop()
    other.join(PATIENCE_S)


@pytest.mark.usefixtures("listener")
def test_a_lost_connection_is_made_anew(heard: Heard) -> None:
    assert coordination.client().client_kill_filter(_type="pubsub") >= 1

    def answered() -> bool:
        say()
        return heard.calls >= 3

    assert eventually(answered)


def test_it_waits_for_a_valkey_that_comes_later(valkey: str, heard: Heard, settings: Settings) -> None:
    settings.REDIS_URL = "unix:///nonexistent/valkey.sock"
    coordination.client.cache_clear()
    listener = DemandListener(heard)
    listener.start()
    listener.join(0.2)
    assert (listener.is_alive(), heard.calls) == (True, 0)
    settings.REDIS_URL = valkey
    coordination.client.cache_clear()
    assert eventually(lambda: heard.calls == 1)
    listener.stop()
    listener.join(PATIENCE_S)
