"""Tasks: what they send next, that they never overlap, and that a missing broker never reaches whoever saves a form."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, signals
from django.conf import settings as django_settings
from django.db import transaction
from django.utils import timezone
from kombu import Connection
from pytest_django.fixtures import Settings

from assistant_site.celery import LeasedScheduler, app, listen_for_demand
from models_app import coordination, launch_spec, loads, nodes, tasks
from models_app.contracts.coordination import DEMAND, LOADS
from models_app.models import Instance, Load, Node, State
from models_app.process_identity import boot_id
from tests.models.instances import make_instance, make_model, make_node

NODE = django_settings.ASSISTANT_NODE
CONTROL, OWN, BULK = "control", f"node.{NODE}", f"bulk.{NODE}"


@pytest.fixture(autouse=True)
def broker(valkey: str) -> Iterator[None]:
    """An empty broker and no leases, before and after."""
    empty()
    yield
    empty()


def channel(connection: Connection) -> Any:
    """The Redis transport's channel; kombu's type is that of its base."""
    return connection.default_channel


def empty() -> None:
    for key in coordination.client().scan_iter(match="assistant:*"):
        coordination.client().delete(key)
    with app.connection_for_write() as connection:
        for queue in (CONTROL, OWN, BULK):
            channel(connection).queue_purge(queue)


def sent(queue: str) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """(task, args, kwargs) of everything waiting in a queue, which is emptied."""
    found = []
    with app.connection_for_read() as connection:
        while message := channel(connection).basic_get(queue, no_ack=True):
            args, kwargs, _ = json.loads(message.body)
            found.append((message.headers["task"].removeprefix("models_app.tasks."), args, kwargs))
    return found


def waiting_for(queue: str) -> tuple[str, list[Any], dict[str, Any]] | None:
    """The first message that comes, within ten seconds; the rest is dropped."""
    until = time.monotonic() + 10
    while not (found := sent(queue)) and time.monotonic() < until:
        time.sleep(0.01)
    return found[0] if found else None


@pytest.fixture
def no_broker() -> Iterator[None]:
    """Tasks are sent by an application whose broker is not there."""
    Celery("lonely", broker="redis+socket:///nonexistent/valkey.sock").set_current()
    yield
    app.set_current()


@pytest.mark.django_db
class TestReconcile:
    def test_a_request_is_sent_once_the_change_is_committed(self, django_capture_on_commit_callbacks: Any) -> None:
        with django_capture_on_commit_callbacks(execute=True), transaction.atomic():
            tasks.request_reconcile()
            assert sent(CONTROL) == []
        assert sent(CONTROL) == [("reconcile", [], {"insist": True})]

    def test_a_new_model_is_ordered_to_its_node(self) -> None:
        coordination.node_beat(make_node().name, 10_000)
        make_model()
        tasks.reconcile()
        instance = Instance.objects.get()
        assert sent(OWN) == [("provision", [instance.pk, 0], {})]
        assert sent(CONTROL) == []

    def test_a_round_opens_loads_and_tells_who_waits(self) -> None:
        make_model()
        tasks.reconcile()
        assert coordination.read_hash(LOADS)["smol\nchat"]["detail"] == loads.NO_NODE
        coordination.node_beat(make_node().name, 10_000)
        tasks.reconcile()
        assert Load.objects.get().instance == Instance.objects.get()
        assert coordination.read_hash(LOADS)["smol\nchat"]["state"] == "waiting"

    def test_a_second_round_does_not_run_beside_the_first(self) -> None:
        lease = coordination.acquire("reconcile", 10_000)
        make_model()
        tasks.reconcile()
        assert not Instance.objects.exists()
        assert sent(CONTROL) == []
        tasks.reconcile(insist=True)
        assert sent(CONTROL) == [("reconcile", [], {})]
        assert lease is not None
        lease.release()

    def test_a_round_gives_its_lease_back(self) -> None:
        tasks.reconcile()
        assert coordination.holder("reconcile") is None


@pytest.mark.django_db
class TestOneInstance:
    def test_a_look_that_is_not_the_last_sends_the_next_with_the_same_chain(self) -> None:
        instance = make_instance(State.STARTING, generation=1, port=20_001)
        tasks.advance(instance.pk, 1)
        chain = coordination.holder(f"advance:{instance.pk}:1")
        assert sent(OWN) == [("advance", [instance.pk, 1, chain], {})]
        tasks.advance(instance.pk, 1, chain)
        assert sent(OWN) == [("advance", [instance.pk, 1, chain], {})]

    def test_a_look_at_a_load_tells_how_far_it_is(self) -> None:
        instance = make_instance(State.STARTING, generation=1, port=20_001, started_at=timezone.now())
        loads.follow({})
        coordination.client().delete(LOADS)
        Load.objects.update(heartbeat_at=None)
        tasks.advance(instance.pk, 1)
        assert coordination.read_hash(LOADS)["smol\nchat"]["state"] == "loading"

    def test_two_chains_never_run_beside_each_other(self) -> None:
        instance = make_instance(State.STARTING, generation=1, port=20_001)
        tasks.advance(instance.pk, 1)
        sent(OWN)
        tasks.advance(instance.pk, 1)
        tasks.advance(instance.pk, 1, "a chain that was given up")
        assert sent(OWN) == []

    def test_the_last_look_ends_the_chain_and_asks_for_a_reconcile(self, django_capture_on_commit_callbacks: Any) -> None:
        instance = make_instance(State.STOPPING, generation=1)
        with django_capture_on_commit_callbacks(execute=True):
            tasks.advance(instance.pk, 1)
        assert Instance.objects.get().state == State.STOPPED
        assert sent(OWN) == []
        assert sent(CONTROL) == [("reconcile", [], {"insist": True})]
        assert coordination.holder(f"advance:{instance.pk}:1") is None

    @pytest.mark.parametrize("task", [tasks.provision, tasks.stop, tasks.advance])
    def test_an_order_for_another_generation_or_node_does_nothing(self, task: Any) -> None:
        stale = make_instance(State.PENDING, generation=3)
        elsewhere = make_instance(State.PENDING, node=make_node("another"))
        task(stale.pk, 2)
        task(elsewhere.pk, 0)
        task(12345, 0)
        assert set(Instance.objects.values_list("state", flat=True)) == {State.PENDING}
        assert sent(OWN) == []

    def test_a_failed_instance_is_not_started_before_its_time(self) -> None:
        instance = make_instance(model=make_model(chat_model_path="missing.gguf"))
        tasks.provision(instance.pk, 0)
        first = Instance.objects.get()
        assert "There is no file missing.gguf" in first.exit_reason
        tasks.provision(instance.pk, 0)
        assert first.state == State.FAILED
        assert Instance.objects.get().state_changed_at == first.state_changed_at


class TestDemand:
    def test_a_worker_for_reconcile_hears_demand_until_it_ends(self) -> None:
        before = threading.active_count()
        listen_for_demand(sender=SimpleNamespace(app=app))
        assert waiting_for(CONTROL) == ("reconcile", [], {"insist": True})
        coordination.client().publish(DEMAND, "smol")
        assert waiting_for(CONTROL) == ("reconcile", [], {"insist": True})
        signals.worker_shutting_down.send(sender="test")
        until = time.monotonic() + 10
        while threading.active_count() > before and time.monotonic() < until:
            time.sleep(0.01)
        assert threading.active_count() == before

    def test_a_worker_for_other_queues_does_not_listen(self) -> None:
        before = threading.active_count()
        queues = SimpleNamespace(consume_from={BULK: None})
        listen_for_demand(sender=SimpleNamespace(app=SimpleNamespace(amqp=SimpleNamespace(queues=queues))))
        assert threading.active_count() == before


@pytest.mark.django_db
class TestNodes:
    def test_a_heartbeat_registers_the_node_and_is_heard(self, django_capture_on_commit_callbacks: Any) -> None:
        with django_capture_on_commit_callbacks(execute=True):
            tasks.node_heartbeat()
        node = Node.objects.get(name=NODE)
        assert node.cpu_count
        assert node.memory_bytes
        assert node.last_seen_at is not None
        assert coordination.beating_nodes([NODE]) == {NODE}
        assert [task for task, _, _ in sent(CONTROL)] == ["reconcile"]

    def test_a_heartbeat_does_not_write_its_row_every_time(self, django_assert_num_queries: Any) -> None:
        nodes.heartbeat(NODE)
        with django_assert_num_queries(1):
            assert not nodes.heartbeat(NODE)

    def test_periodic_work_goes_to_this_node_and_to_those_seen_lately(self) -> None:
        make_node("forgotten")
        tasks.fan_out("models_app.tasks.node_heartbeat", "node", 5.0)
        assert [task for task, _, _ in sent(OWN)] == ["node_heartbeat"]
        assert nodes.to_ask() == [NODE]

    def test_a_health_round_of_nothing_sends_nothing(self) -> None:
        tasks.check_health()
        assert (sent(OWN), sent(CONTROL)) == ([], [])

    def test_ingest_reads_the_spool_of_this_node(self) -> None:
        tasks.ingest_usage()


@pytest.mark.django_db
class TestWithoutBroker:
    @pytest.mark.usefixtures("no_broker")
    def test_saving_a_form_never_fails(self, caplog: pytest.LogCaptureFixture, django_capture_on_commit_callbacks: Any) -> None:
        with caplog.at_level(logging.WARNING), django_capture_on_commit_callbacks(execute=True):
            tasks.request_reconcile()
        assert "reconcile was not sent, the broker does not answer" in caplog.text

    def test_a_broker_that_hangs_is_given_up(
        self, settings: Settings, caplog: pytest.LogCaptureFixture, django_capture_on_commit_callbacks: Any, tmp_path: Path
    ) -> None:
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.bind(str(tmp_path / "v.sock"))
            deaf.listen()  # the kernel accepts, nobody answers
            settings.REDIS_URL = f"unix://{tmp_path}/v.sock"
            coordination.client.cache_clear()
            with caplog.at_level(logging.WARNING), django_capture_on_commit_callbacks(execute=True):
                tasks.request_reconcile()
            coordination.client.cache_clear()
        assert "reconcile was not sent, the broker does not answer" in caplog.text

    def test_a_lease_that_cannot_be_asked_for_skips_the_round(self, settings: Settings) -> None:
        settings.REDIS_URL = "unix:///nonexistent/valkey.sock"
        coordination.client.cache_clear()
        make_model()
        tasks.reconcile()
        coordination.client.cache_clear()
        assert not Instance.objects.exists()


def test_every_schedule_entry_names_a_task_and_expires_within_its_period() -> None:
    for entry in app.conf.beat_schedule.values():
        names = {entry["task"], entry["kwargs"].get("task", entry["task"])}
        assert names <= set(app.tasks)
        assert entry["options"]["expires"] <= entry["schedule"]


def test_control_tasks_have_limits_and_bulk_work_has_none() -> None:
    own = {name: task for name, task in app.tasks.items() if name.startswith("models_app.")}
    assert len(own) >= 7
    for name, task in own.items():
        limits = (task.soft_time_limit, task.time_limit)
        assert limits == ((None, None) if name.endswith("ingest_usage") else (20, 30))


def test_the_broker_is_asked_again_soon_and_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(Connection, "ensure_connection", lambda _, *args, **kwargs: asked.update(kwargs))
    app.connection_for_read().ensure_connection()
    assert (asked["interval_start"], asked["interval_step"], asked["interval_max"]) == (0.5, 0.5, 2.0)
    assert app.conf.broker_connection_max_retries is None


class TestBeat:
    def test_a_second_beat_is_refused_by_name(self) -> None:
        first = LeasedScheduler(app)
        with pytest.raises(SystemExit, match=f"Another beat runs already \\(pid {os.getpid()} on node {NODE}\\)"):
            LeasedScheduler(app)
        first.close()
        LeasedScheduler(app).close()

    def test_a_beat_that_was_killed_here_is_succeeded_at_once(self) -> None:
        dead = subprocess.run(
            [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
        ).stdout.strip()
        token = f"{NODE}/{boot_id()}/{dead}/1/abcd"
        assert coordination.acquire("beat", 60_000, token) is not None
        LeasedScheduler(app).close()

    def test_a_beat_elsewhere_or_of_unknown_make_is_respected(self) -> None:
        for token in ("another-node/boot/1/1/abcd", "what is this"):
            lease = coordination.acquire("beat", 60_000, token)
            assert lease is not None
            with pytest.raises(SystemExit, match="Another beat runs already"):
                LeasedScheduler(app)
            lease.release()

    def test_a_lease_that_ran_out_is_taken_again(self) -> None:
        beat = LeasedScheduler(app)
        coordination.client().delete("assistant:lease:beat")
        beat._renewed -= beat.RENEW_S
        beat.tick()
        assert coordination.holder("beat") is not None
        beat.close()
        assert coordination.holder("beat") is None


@pytest.mark.django_db
def test_an_instance_as_wanted_causes_no_order() -> None:
    coordination.node_beat(make_node().name, 10_000)
    model = make_model()
    make_instance(State.FAILED, model, launch_digest=launch_spec.digest(model, "chat"))
    tasks.reconcile()
    assert sent(OWN) == []


def test_beat_counts_its_periods_by_the_monotonic_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing it looks at is the wall clock, so nothing can be set back."""
    beat = LeasedScheduler(app)
    try:
        beat.populate_heap()
        entry = beat.data["reconcile"]
        now = time.monotonic()
        assert beat.is_due(entry) == (True, 2.0)
        due, wait_s = beat.is_due(entry)
        assert (due, 1.0 < wait_s <= 2.0) == (False, True)
        monkeypatch.setattr(time, "monotonic", lambda: now + 2.5)
        assert beat.is_due(entry) == (True, 2.0)
        assert beat._when(entry, 1.5) == now + 4.0
    finally:
        monkeypatch.undo()
        beat.close()
