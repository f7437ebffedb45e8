"""Loads follow instances: rows, what is learned from them, what is published of them. Instances are put into states by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from django.utils import timezone
from hypothesis import given, strategies
from pytest_django.fixtures import Settings

from models_app import coordination, launch_spec, loads
from models_app.contracts.coordination import LOAD_LIFE_S, LOADS
from models_app.loads import ALMOST, Sight, sight, stage_of
from models_app.models import Cause, Instance, Load, ModelConfig, State
from models_app.process_identity import identify
from models_app.scheduler import Target
from tests.models.instances import make_instance, make_model, make_node

S, Stage = State, Load.Stage
FIELD = "smol\nchat"


# Pure


def test_progress_is_time_or_memory_whichever_is_further() -> None:
    assert sight(3.0, 10.0, None) == Sight(0.3, 7.0)
    assert sight(3.0, 10.0, 0.5) == Sight(0.5, 7.0)
    assert sight(3.0, None, 0.5) == Sight(0.5, None)
    assert sight(3.0, None, None) == Sight(0.0, None)
    assert sight(-5.0, 10.0, None) == Sight(0.0, 10.0)  # the clock was set back


def test_an_overdue_load_needs_the_longer_the_longer_it_has_taken() -> None:
    assert sight(10.0, 10.0, None) == Sight(ALMOST, 2.0)
    assert sight(50.0, 10.0, None) == Sight(ALMOST, 10.0)


@given(
    elapsed=strategies.floats(-1e6, 1e6), expected=strategies.none() | strategies.floats(0.01, 1e5),
    memory=strategies.none() | strategies.floats(0, 3),
)  # fmt: skip
def test_progress_never_arrives_early_and_no_time_is_negative(
    elapsed: float, expected: float | None, memory: float | None
) -> None:
    seen = sight(elapsed, expected, memory)
    assert 0.0 <= seen.progress <= ALMOST
    assert seen.eta_s is None or seen.eta_s >= 0.0


@pytest.mark.parametrize(
    ("state", "at", "was_ready", "stage"),
    [
        (S.PENDING, 1, False, Stage.WAITING),
        (S.PENDING, 1, True, Stage.WAITING),  # the generation before was
        (S.FAILED, 1, False, Stage.FAILED),  # refused
        (S.CRASH_LOOP, 1, False, Stage.FAILED),
        (S.STOPPED, 1, False, Stage.CANCELLED),
        (S.STARTING, 2, False, Stage.LOADING),
        (S.READY, 2, True, Stage.READY),
        (S.FAILED, 2, False, Stage.FAILED),
        (S.CRASH_LOOP, 2, False, Stage.FAILED),
        (S.PENDING, 2, False, Stage.FAILED),  # and was reset
        (S.STOPPING, 2, False, Stage.CANCELLED),
        (S.STOPPED, 2, False, Stage.CANCELLED),
        (S.DRAINING, 2, True, Stage.READY),  # all within one round
        (S.FAILED, 2, True, Stage.READY),
        (S.STARTING, 3, False, Stage.FAILED),  # a later attempt
        (S.READY, 3, True, Stage.FAILED),
    ],
)
def test_the_stage_of_generation_two_follows_its_instance(state: State, at: int, was_ready: bool, stage: Load.Stage) -> None:
    assert stage_of(2, state, at, was_ready) == stage


# Effects


@pytest.fixture(autouse=True)
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("django_db") is None:
        yield
        return
    request.getfixturevalue("valkey")
    coordination.client().delete(LOADS)
    yield
    coordination.client().delete(LOADS)


def published() -> Any:
    return coordination.read_hash(LOADS)


def change(instance: Instance, **fields: Any) -> None:
    """What the life cycle would have done meanwhile."""
    Instance.objects.filter(pk=instance.pk).update(**fields)


def loaded(seconds: float, **fields: Any) -> Load:
    """A load that succeeded earlier."""
    end = timezone.now() - timedelta(hours=1)
    model = fields.pop("model", None) or ModelConfig.objects.get(name="smol")
    row = {
        "model": model, "model_name": model.name, "node": make_node(), "cause": Cause.MINIMUM, "stage": Stage.READY,
        "launch_digest": launch_spec.digest(model, "chat"), "started_at": end - timedelta(seconds=seconds), "ended_at": end,
    }  # fmt: skip
    return Load.objects.create(**{**row, **fields})


@pytest.mark.django_db
class TestRows:
    def test_a_load_goes_with_its_instance_from_waiting_to_ready(self) -> None:
        instance = make_instance(S.PENDING, cause=Cause.DEMAND, hold="memory", hold_reason="It needs more than is free.")
        loads.follow({})
        load = Load.objects.get()
        assert (load.stage, load.cause, load.generation, load.detail) == (
            Stage.WAITING, Cause.DEMAND, 1, "It needs more than is free.",
        )  # fmt: skip
        now = timezone.now()
        change(instance, state=S.STARTING, generation=1, started_at=now, launch_digest="d", hold_reason="")
        loads.follow({}, now + timedelta(seconds=3))
        load.refresh_from_db()
        assert (load.stage, load.started_at, load.launch_digest, load.detail) == (Stage.LOADING, now, "d", "")
        ready_at = now + timedelta(seconds=4)
        change(instance, state=S.READY, port=20_000, pid=1, ready_at=ready_at)
        loads.follow({}, now + timedelta(seconds=5))
        load.refresh_from_db()
        assert (load.stage, load.ended_at, load.progress) == (Stage.READY, ready_at, 1.0)
        loads.follow({})
        assert Load.objects.count() == 1

    def test_one_that_is_asked_for_by_hand_meanwhile_says_so(self) -> None:
        instance = make_instance(S.PENDING, cause=Cause.DEMAND)
        loads.follow({})
        change(instance, cause=Cause.MANUAL)
        loads.follow({})
        assert Load.objects.get().cause == Cause.MANUAL

    def test_a_load_that_is_over_between_two_rounds_is_learned_from_too(self) -> None:
        instance = make_instance(S.PENDING)
        loads.follow({})
        start = timezone.now()
        end = start + timedelta(seconds=1)
        change(instance, state=S.READY, generation=1, port=20_000, pid=1, started_at=start, ready_at=end, launch_digest="d")
        loads.follow({})
        load = Load.objects.get()
        assert (load.stage, load.started_at, load.ended_at, load.launch_digest) == (Stage.READY, start, end, "d")

    def test_a_failed_one_says_why_and_a_retry_is_another(self) -> None:
        instance = make_instance(S.STARTING, generation=1, started_at=timezone.now())
        loads.follow({})
        change(instance, state=S.FAILED, exit_reason="It was killed.")
        loads.follow({})
        assert (Load.objects.get().stage, Load.objects.get().detail) == (Stage.FAILED, "It was killed.")
        change(instance, state=S.STARTING, generation=2)
        loads.follow({})
        assert list(Load.objects.order_by("id").values_list("generation", "stage")) == [(1, Stage.FAILED), (2, Stage.LOADING)]

    def test_a_retry_that_came_between_two_rounds_is_another_too(self) -> None:
        instance = make_instance(S.STARTING, generation=1, started_at=timezone.now())
        loads.follow({})
        change(instance, generation=2)
        loads.follow({})
        assert list(Load.objects.order_by("id").values_list("generation", "stage")) == [(1, Stage.FAILED), (2, Stage.LOADING)]

    @pytest.mark.parametrize("state", [S.STOPPED, S.STOPPING])
    def test_one_that_was_given_up_is_cancelled(self, state: State) -> None:
        instance = make_instance(S.PENDING)
        loads.follow({})
        change(instance, state=state)
        loads.follow({})
        assert Load.objects.get().stage == Stage.CANCELLED

    def test_an_instance_that_is_gone_leaves_no_open_load(self) -> None:
        make_instance(S.PENDING)
        loads.follow({})
        Instance.objects.all().delete()
        loads.follow({})
        load = Load.objects.get()
        assert (load.stage, load.detail) == (Stage.CANCELLED, "Its instance is gone.")
        assert published() == {}

    def test_two_rounds_at_once_open_one_load(self) -> None:
        instance = make_instance(S.PENDING)
        loads._open([instance])
        loads._open([instance])
        Load.objects.bulk_create([loads._new(instance)], ignore_conflicts=True)
        assert Load.objects.count() == 1

    def test_the_newest_of_each_model_are_kept(self) -> None:
        make_model()
        loaded(1.0, model=make_model("other"))
        for _ in range(loads.KEPT + 5):
            loaded(1.0)
        instance = make_instance(S.STARTING, generation=1)
        loads.follow({})
        change(instance, state=S.FAILED)
        loads.follow({})
        assert Load.objects.filter(model_name="smol").count() == loads.KEPT
        assert Load.objects.filter(model_name="other").count() == 1


@pytest.mark.django_db
class TestExpectation:
    def expected(self, **fields: Any) -> float | None:
        Load.objects.filter(ended_at__isnull=True).delete()
        Instance.objects.all().delete()
        make_instance(S.PENDING, **fields)
        loads.follow({})
        return Load.objects.get(ended_at__isnull=True).expected_s

    def test_nothing_is_expected_where_nothing_was_loaded(self) -> None:
        assert self.expected() is None

    def test_the_median_of_the_last_five_of_this_launch_counts(self) -> None:
        make_model()
        for seconds in (900.0, 2.0, 3.0, 10.0, 4.0, 5.0):
            loaded(seconds)
        assert self.expected() == pytest.approx(4.0)

    def test_else_other_launches_here_else_other_nodes(self) -> None:
        make_model()
        loaded(7.0, node=make_node("another"))
        assert self.expected() == pytest.approx(7.0)
        loaded(3.0, launch_digest="before")
        assert self.expected() == pytest.approx(3.0)
        loaded(2.0)
        assert self.expected() == pytest.approx(2.0)

    def test_failures_other_parts_and_nonsense_teach_nothing(self) -> None:
        make_model()
        loaded(9.0, stage=Stage.FAILED)
        loaded(9.0, part="embedding", model=None, node=make_node("another"))
        loaded(-9.0)
        assert self.expected() is None

    def test_else_the_size_of_the_file_at_the_pace_of_other_models_here(self, settings: Settings, tmp_path: Path) -> None:
        settings.ASSISTANT_MODEL_DIRS = [tmp_path]
        (tmp_path / "smol.gguf").write_bytes(b"x" * 3000)
        (tmp_path / "other.gguf").write_bytes(b"x" * 1000)
        make_model()
        loaded(2.0, model=make_model("other", chat_model_path="other.gguf"))
        assert self.expected() == pytest.approx(6.0)
        assert self.expected(node=make_node("another")) is None
        (tmp_path / "smol.gguf").unlink()
        assert self.expected() is None


@pytest.mark.django_db
class TestPublished:
    def test_a_load_is_published_with_its_progress_until_it_has_ended(self) -> None:
        make_model()
        loaded(10.0)
        now = timezone.now()
        instance = make_instance(S.STARTING, generation=1, started_at=now - timedelta(seconds=4))
        loads.follow({}, now)
        said = published()[FIELD]
        assert said == {"state": "loading", "progress": 0.4, "eta_s": 6.0, "detail": "", "at": now.timestamp()}
        assert 0 < coordination.client().pttl(LOADS) <= LOAD_LIFE_S * 1000
        change(instance, state=S.READY, ready_at=now, port=20_000, pid=1)
        loads.follow({}, now)
        assert published() == {}

    def test_one_that_waits_says_for_what(self) -> None:
        make_model()
        loaded(10.0)
        make_instance(S.PENDING, hold="memory", hold_reason="It needs 8 GiB, 3 GiB are free.")
        loads.follow({})
        said = published()[FIELD]
        assert (said["state"], said["progress"], said["eta_s"]) == ("waiting", 0.0, None)
        assert said["detail"] == "It needs 8 GiB, 3 GiB are free."

    def test_one_that_only_waits_its_turn_has_an_expectation(self) -> None:
        make_model()
        loaded(10.0)
        make_instance(S.PENDING)
        loads.follow({})
        assert (published()[FIELD]["state"], published()[FIELD]["eta_s"]) == ("waiting", 10.0)

    def test_of_several_the_furthest_is_told(self) -> None:
        make_model(max_replicas=3)
        loaded(10.0)
        now = timezone.now()
        for elapsed in (2, 8):
            make_instance(S.STARTING, generation=1, started_at=now - timedelta(seconds=elapsed))
        make_instance(S.PENDING, hold_reason="There is no room.")
        loads.follow({}, now)
        assert published()[FIELD]["progress"] == 0.8

    def test_a_part_that_no_node_takes_says_so(self) -> None:
        model = make_model()
        loads.follow({(model.pk, "chat"): Target(1, "demand", wanted=True), (12345, "chat"): Target(1)})
        assert published()[FIELD]["detail"] == loads.NO_NODE
        assert not Load.objects.exists()
        loads.follow({(model.pk, "chat"): Target(0)})
        assert published() == {}

    def test_between_two_tries_the_next_is_announced(self) -> None:
        now = timezone.now()
        make_instance(S.FAILED, next_attempt_at=now + timedelta(seconds=20))
        loads.follow({}, now)
        assert published()[FIELD]["detail"] == "The last start failed; the next is tried in 20 s."

    def test_without_valkey_rows_are_kept_all_the_same(self, settings: Settings) -> None:
        instance = make_instance(S.PENDING)
        settings.REDIS_URL = "unix:///nonexistent/valkey.sock"
        coordination.client.cache_clear()
        loads.follow({})
        loads.look(instance)
        coordination.client.cache_clear()
        assert Load.objects.get().stage == Stage.WAITING


@pytest.mark.django_db
class TestLook:
    def test_looks_move_the_row_and_publish_once_a_second(self) -> None:
        make_model()
        loaded(10.0)
        instance = make_instance(S.PENDING)
        now = timezone.now()
        loads.follow({}, now - timedelta(seconds=5))
        change(instance, state=S.STARTING, generation=1, started_at=now, launch_digest=Load.objects.earliest("id").launch_digest)
        instance.refresh_from_db()
        shown = []
        for tenth in range(30):
            loads.look(instance, now + timedelta(seconds=tenth / 10))
            shown.append(published()[FIELD]["at"])
        assert len(set(shown)) == 3
        load = Load.objects.get(ended_at__isnull=True)
        assert load.stage == Stage.LOADING
        assert load.progress == pytest.approx(0.2)

    def test_what_a_process_has_taken_of_its_memory_counts_and_progress_never_falls(self) -> None:
        """The engine is emulated by a Python process that holds a known lot of memory."""
        program = "import sys; hold = bytearray(64 << 20); print(flush=True); sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as engine:
            assert engine.stdout is not None
            engine.stdout.readline()
            identity = identify(engine.pid)
            assert identity is not None
            now, rss = timezone.now(), psutil.Process(engine.pid).memory_info().rss
            instance = make_instance(
                S.STARTING, generation=1, started_at=now, memory_bytes=2 * rss, pid=engine.pid,
                start_ticks=identity.start_ticks, boot_id=identity.boot_id,
            )  # fmt: skip
            loads.follow({}, now)
            assert published()[FIELD]["progress"] == pytest.approx(0.5, abs=0.05)
            engine.communicate(b"")
        loads.follow({}, now + timedelta(seconds=2))
        assert published()[FIELD]["progress"] == pytest.approx(0.5, abs=0.05)
        loads.look(instance, now + timedelta(seconds=4))
        assert published()[FIELD]["progress"] == pytest.approx(0.5, abs=0.05)

    def test_a_pid_that_another_process_has_now_says_nothing(self) -> None:
        now = timezone.now()
        make_instance(S.STARTING, generation=1, started_at=now, memory_bytes=1, pid=os.getpid(), start_ticks=1, boot_id="b")
        loads.follow({}, now)
        assert published()[FIELD]["progress"] == 0.0


@pytest.mark.django_db
class TestWords:
    def test_people_read_how_far_it_is(self) -> None:
        model = make_model()
        loaded(10.0)
        now = timezone.now()
        instance = make_instance(S.PENDING, model, hold_reason="3 GiB are missing.")
        loads.follow({}, now)
        assert [loads.in_words(load, now) for load in loads.current(model.pk)] == ["waits: 3 GiB are missing."]
        change(instance, state=S.STARTING, generation=1, started_at=now, launch_digest=launch_spec.digest(model, "chat"))
        loads.follow({}, now + timedelta(seconds=4))
        [load] = loads.current(model.pk)
        assert loads.in_words(load, now + timedelta(seconds=4)) == "loading 40 %, about 6 s"
        assert loads.in_words(load, now + timedelta(seconds=40)) == "loading 95 %, longer than usual"
        load.expected_s = None
        assert loads.in_words(load, now + timedelta(seconds=4)) == "loading 40 %"
        change(instance, state=S.FAILED, exit_reason="It was killed.")
        loads.follow({}, now)
        assert loads.current(model.pk) == []
        assert loads.in_words(Load.objects.get(pk=load.pk)) == "It was killed."

    def test_one_without_a_reason_waits_to_be_started(self) -> None:
        assert loads.in_words(Load(stage=Stage.WAITING)) == "waits to be started"
        assert loads.in_words(Load(stage=Stage.READY)) == "ready"

    def test_what_a_held_instance_waits_for_is_named(self) -> None:
        load = Load(stage=Stage.WAITING, detail="3 GiB are missing.")
        assert loads.in_words(load, hold="memory") == "waits for memory: 3 GiB are missing."
        assert loads.in_words(load, hold="node_full") == "waits for room on its node: 3 GiB are missing."

    def test_a_time_is_told_only_where_one_is_known(self) -> None:
        now = timezone.now()
        assert loads.eta_s(Load(expected_s=10.0), now) == 10.0
        assert loads.eta_s(Load(expected_s=10.0, detail="3 GiB are missing."), now) is None
        assert loads.eta_s(Load(expected_s=10.0, started_at=now - timedelta(seconds=4)), now) == 6.0
        assert loads.eta_s(Load(expected_s=None, started_at=now), now) is None
        assert loads.eta_s(Load(expected_s=10.0, started_at=now, ended_at=now), now) is None
