"""`up --keep-engines`: engines outlive the platform and serve the next one, whatever they were doing when it stopped."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.running_platform import Platform, wait_until

pytestmark = [pytest.mark.platform, pytest.mark.timeout(300)]  # several lives of a platform


@pytest.fixture(scope="module")
def kept(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A platform that serves the demo model and keeps its engines. Ends with a plain life, which must leave nothing."""
    running = Platform(tmp_path_factory.mktemp("k") / "h", options=("--keep-engines",))
    try:
        running.start(demo_model)
        yield running
    finally:
        if running.process is not None and running.process.poll() is None:
            running.stop(60)
        running.options = ()
        running.start()
        assert running.stop(60) == 0, running.output[-4000:]
        assert running.processes() == []


def sql(platform: Platform, statement: str, *values: Any) -> list[Any]:
    """Straight at the database file, while nobody serves."""
    with closing(sqlite3.connect(platform.home / "assistant.sqlite3")) as database, database:
        return database.execute(statement, values).fetchall()


def states(platform: Platform) -> dict[int, str]:
    """Of every instance that has not ended, by pid."""
    rows = sql(platform, "SELECT pid, state FROM models_app_instance WHERE state != 'STOPPED'")
    return dict(rows)


def test_the_next_up_serves_with_the_same_process_at_once(kept: Platform) -> None:
    assert kept.chat().status_code == 200
    engine = kept.engine()
    assert "Ctrl-C stops everything but the engines." in kept.output

    assert kept.stop(60) == 0, kept.output[-4000:]

    assert "1 engine left running; the next start takes them over" in kept.output
    assert engine.is_running()
    assert {process.pid for process in kept.processes() if "embedded_server" not in " ".join(process.cmdline())} <= {
        process.pid for process in kept.processes("shim")
    }
    assert states(kept) == {engine.pid: "READY"}
    generation = sql(kept, "SELECT id, generation FROM models_app_instance")

    kept.start()

    assert kept.chat().status_code == 200
    assert kept.engine() == engine
    assert sql(kept, "SELECT id, generation FROM models_app_instance") == generation


def test_engines_that_were_starting_or_draining_are_resolved_by_the_next_life(kept: Platform) -> None:
    """Emulates stops at those very moments: the rows are put into the state they would have been left in."""
    engine = kept.engine()
    assert kept.stop(60) == 0
    sql(kept, "UPDATE models_app_instance SET state = 'STARTING', ready_at = NULL, pid = NULL, start_ticks = NULL")

    kept.start()

    wait_until(lambda: states(kept) == {engine.pid: "READY"}, 60, "the starting engine to be adopted")
    assert kept.chat().status_code == 200
    assert kept.engine() == engine

    assert kept.stop(60) == 0
    sql(kept, "UPDATE models_app_instance SET state = 'DRAINING', deadline_at = '2020-01-01 00:00:00'")

    kept.start()

    wait_until(lambda: not engine.is_running(), 60, "the draining engine to end")
    wait_until(lambda: list(states(kept).values()) == ["READY"], 60, "another to be ready in its place")
    assert kept.engine() != engine
    assert kept.chat().status_code == 200
