"""Processes and rows together, on a toy engine that is a real process under a real shim."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.db import connection
from django.utils import timezone
from pytest_django.fixtures import Settings

from models_app import coordination, health, lifecycle, provisioning, runtime_folder
from models_app.contracts import secret_box
from models_app.contracts.coordination import USE_LIFE_MS, use_key
from models_app.engines.registry import ENGINES
from models_app.exceptions import StaleTransition
from models_app.health_verdict import FAILED_PROBES
from models_app.models import Instance, ModelConfig, State
from models_app.process_identity import alive, send, wait_gone
from tests.fakes import gguf_files
from tests.models.instances import make_instance, make_model, make_node
from tests.models.toy import ToyEngine

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("valkey", "toy")]
PATIENCE_S = 20.0


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, settings: Settings, tmp_path: Path) -> Iterator[None]:
    """The toy registered as any engine is; every process it left is ended."""
    monkeypatch.setitem(ENGINES, "toy", ToyEngine)
    settings.ASSISTANT_INSTANCES_DIR = tmp_path / "instances"
    settings.ASSISTANT_MODEL_DIRS = [tmp_path]
    settings.ASSISTANT_ENGINE_TERM_S = 0.5
    gguf_files.llama(tmp_path / "smol.gguf")
    yield
    for stray in provisioning.marked_processes():
        send(stray.process, signal.SIGKILL)
        assert wait_gone(stray.process, PATIENCE_S)


def started(behaviour: str = "serve", **fields: Any) -> Instance:
    instance = make_instance(model=make_model(engine="toy", extra_args={"behaviour": behaviour}, **fields))
    assert provisioning.provision(instance)
    return instance


def settle(instance: Instance) -> Instance:
    """Look again and again, as the tasks do, until the instance has arrived."""
    until = time.monotonic() + PATIENCE_S
    while (again := provisioning.advance(instance)) is not None:
        assert time.monotonic() < until, instance.state
        time.sleep(min(again, 0.05))
    instance.refresh_from_db()
    return instance


def ready(behaviour: str = "serve") -> Instance:
    instance = settle(started(behaviour))
    assert instance.state == State.READY, instance.exit_reason
    return instance


def test_a_start_leads_to_ready_with_everything_on_record() -> None:
    instance = ready()
    engine = provisioning.engine_of(instance)
    assert engine is not None
    assert alive(engine)
    assert instance.generation == 1
    assert instance.port is not None
    assert 20_000 <= instance.port <= 29_999
    assert str(provisioning.folder_of(instance)) in Path(f"/proc/{engine.pid}/cmdline").read_text()


def test_a_model_renamed_before_its_process_starts_starts_under_its_new_name() -> None:
    instance = make_instance(model=make_model(engine="toy", extra_args={"behaviour": "serve"}))
    ModelConfig.objects.update(name="renamed")
    instance = Instance.objects.select_related("model", "node").get(pk=instance.pk)
    assert provisioning.provision(instance)
    assert Instance.objects.get().model_name == "renamed"


def test_what_an_earlier_installation_left_in_the_folder_is_not_taken_for_this_run_s() -> None:
    instance = make_instance(model=make_model(engine="toy", extra_args={"behaviour": "serve"}))
    folder = runtime_folder.path(instance.pk, 1)
    folder.mkdir(parents=True)
    (folder / "exit.json").write_text('{"code": 3}')
    assert provisioning.provision(instance)
    assert runtime_folder.read_exit(folder) is None
    assert settle(instance).state == State.READY


def test_the_engine_s_key_is_random_sealed_and_in_no_argument(settings: Settings) -> None:
    first = ready()
    secret = secret_box.unseal(settings.SECRET_KEY, first.engine_secret)
    assert len(secret) >= 40
    assert secret not in first.engine_secret
    for process in provisioning.living(first):
        assert secret not in Path(f"/proc/{process.pid}/cmdline").read_text()
        assert secret not in Path(f"/proc/{process.pid}/environ").read_text()
    settle_stop(first)
    second = make_instance(model=first.model)
    provisioning.provision(second)
    assert secret_box.unseal(settings.SECRET_KEY, second.engine_secret) != secret


def settle_stop(instance: Instance) -> Instance:
    if provisioning.stop(instance) is not None:
        settle(instance)
    instance.refresh_from_db()
    return instance


def test_an_engine_that_ends_while_loading_is_failed_with_its_last_words() -> None:
    instance = settle(started("exit"))
    assert (instance.state, instance.exit_code) == (State.FAILED, 4)
    assert instance.exit_reason.startswith("The engine ended with exit code 4; it last said: “toy: the tensor is missing”. ")
    assert instance.exit_log == "toy: the tensor is missing"
    assert instance.peak_memory_bytes


def test_an_engine_that_is_not_ready_in_time_is_ended_and_says_what_it_did_last() -> None:
    instance = started("silent")
    engine = provisioning.engine_of(instance)
    assert engine is not None
    assert provisioning.advance(instance) is not None
    until = time.monotonic() + PATIENCE_S
    while not runtime_folder.last_log_lines(provisioning.folder_of(instance), 1):
        assert time.monotonic() < until
    Instance.objects.update(deadline_at=timezone.now())
    instance.refresh_from_db()
    settle(instance)
    assert instance.state == State.FAILED
    assert "not ready in time" in instance.exit_reason
    assert "toy: loading for ever" in instance.exit_reason
    assert not alive(engine)


def started_late(behaviour: str, **more: str) -> Instance:
    """One whose deadline has passed, although it was a generous one."""
    model = make_model(engine="toy", extra_args={"behaviour": behaviour, **more})
    instance = make_instance(model=model)
    assert provisioning.provision(instance)
    now = timezone.now()
    Instance.objects.update(started_at=now - timedelta(minutes=5), deadline_at=now)
    instance.refresh_from_db()
    return instance


def test_a_load_whose_log_still_moves_gets_more_than_its_deadline() -> None:
    assert settle(started_late("slow", delay_s="1.0")).state == State.READY


def test_a_load_that_has_stood_still_for_long_gets_no_more_than_its_deadline() -> None:
    instance = started_late("silent")
    until = time.monotonic() + PATIENCE_S
    while not runtime_folder.last_log_lines(provisioning.folder_of(instance), 1):
        assert time.monotonic() < until
    assert provisioning.advance(instance) is not None
    moved = provisioning.folder_of(instance) / runtime_folder.MOVED
    kept = json.loads(moved.read_text())
    moved.write_text(json.dumps([kept[0] - provisioning.MOVING_S, *kept[1:]]))
    assert settle(instance).diagnosis == "start_timeout"


def test_a_load_that_moves_for_ever_is_given_up_after_several_deadlines() -> None:
    instance = started_late("slow", delay_s="60")
    Instance.objects.update(started_at=timezone.now() - timedelta(minutes=20), deadline_at=timezone.now() - timedelta(minutes=15))
    instance.refresh_from_db()
    assert settle(instance).diagnosis == "start_timeout"


def test_a_port_that_was_taken_after_all_is_exchanged_at_once() -> None:
    instance = settle(started("taken"))
    first = instance.port
    assert (instance.state, instance.diagnosis, instance.failures) == (State.FAILED, "port_taken", 1)
    assert instance.next_attempt_at is not None
    assert instance.next_attempt_at <= timezone.now()
    ModelConfig.objects.update(extra_args={"behaviour": "serve"})
    instance = Instance.objects.select_related("node", "model").get()
    assert provisioning.provision(instance)
    assert instance.port != first
    assert settle(instance).state == State.READY


def test_a_process_of_an_earlier_boot_is_buried_and_one_of_this_boot_is_kept() -> None:
    instance = ready()
    assert health.watch(instance.node.name) == 0
    Instance.objects.update(boot_id="00000000-0000-0000-0000-000000000000")
    assert health.watch(instance.node.name) == 1
    instance.refresh_from_db()
    assert (instance.state, instance.diagnosis) == (State.FAILED, "node_restarted")
    assert instance.next_attempt_at is not None
    assert instance.next_attempt_at <= timezone.now()


@pytest.mark.parametrize("state", [State.STARTING, State.DRAINING, State.STOPPING])
def test_what_was_under_way_when_the_machine_went_down_comes_to_an_end(state: State) -> None:
    instance = started()
    Instance.objects.update(state=state, boot_id="00000000-0000-0000-0000-000000000000", drain_reason="evict")
    strays = provisioning.marked_processes()  # a restart would have ended them
    for one in strays:
        send(one.process, signal.SIGKILL)
        assert wait_gone(one.process, PATIENCE_S)
    instance.refresh_from_db()
    ended = settle(instance)
    expected = (State.FAILED, "node_restarted") if state == State.STARTING else (State.STOPPED, "stopped")
    assert (ended.state, ended.diagnosis) == expected


def test_another_server_on_the_port_is_never_taken_for_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provisioning, "QUICK_FOR_S", 0.0)
    instance = settle(started("wrong"))
    assert instance.state == State.FAILED
    assert f"Another program answers on port {instance.port}" in instance.exit_reason


def test_a_server_that_knows_the_key_but_is_not_our_process_is_never_ready() -> None:
    serving = ready()
    other = started_silent_beside(serving)
    assert provisioning.probe(other).health == "ready"
    assert provisioning.advance(other) is not None
    assert Instance.objects.get(pk=other.pk).state == State.STARTING


def started_silent_beside(serving: Instance) -> Instance:
    """A second engine that does not listen, whose row points to the port and key of the first."""
    other = make_instance(model=make_model("second", engine="toy", extra_args={"behaviour": "silent"}))
    provisioning.provision(other)
    other.port, other.engine_secret = serving.port, serving.engine_secret
    return other


def test_a_failed_preflight_starts_nothing_and_says_why() -> None:
    instance = make_instance(model=make_model(engine="toy"))
    assert not provisioning.provision(instance)
    assert (instance.state, instance.generation) == (State.FAILED, 0)
    assert instance.exit_reason == "The toy has no behaviour; set extra_args."


def test_an_unknown_engine_is_a_sentence_and_not_a_crash() -> None:
    instance = make_instance(model=make_model(engine="steam"))
    assert not provisioning.provision(instance)
    assert "There is no engine “steam”" in instance.exit_reason


def test_a_fixed_port_is_honoured_and_who_holds_it_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        instance = make_instance(model=make_model(engine="toy", extra_args={"behaviour": "serve"}, port=port))
        assert not provisioning.provision(instance)
        assert f"Port {port} is in use by" in instance.exit_reason
        assert f"(pid {os.getpid()})" in instance.exit_reason
    Instance.objects.update(next_attempt_at=timezone.now())
    assert provisioning.provision(instance)
    assert instance.port == port


def test_only_one_of_two_workers_starts_an_instance() -> None:
    instance = make_instance(model=make_model(engine="toy", extra_args={"behaviour": "serve"}))
    other_view = Instance.objects.select_related("node", "model").get()
    assert provisioning.provision(instance)
    with pytest.raises(StaleTransition):
        provisioning.provision(other_view)
    assert {(one.instance_id, one.generation) for one in provisioning.marked_processes()} == {(instance.pk, 1)}


@pytest.mark.django_db(transaction=True)
def test_workers_that_start_many_at_once_never_share_a_port_or_a_generation() -> None:
    model = make_model(engine="toy", extra_args={"behaviour": "serve"}, max_replicas=3)
    instances = [make_instance(model=model) for _ in range(3)] * 2

    def work(instance: Instance) -> bool:
        try:
            return provisioning.provision(Instance.objects.select_related("node", "model").get(pk=instance.pk))
        except StaleTransition:
            return False
        finally:
            connection.close()

    with ThreadPoolExecutor(6) as threads:
        started_by = list(threads.map(work, instances))
    assert sum(started_by) == 3
    rows = Instance.objects.values_list("pk", "generation", "port", "pid")
    assert {generation for _, generation, _, _ in rows} == {1}
    assert len({port for _, _, port, _ in rows}) == len({pid for _, _, _, pid in rows}) == 3


def test_a_model_disabled_meanwhile_is_not_started() -> None:
    instance = make_instance(model=make_model(engine="toy", extra_args={"behaviour": "serve"}, enabled=False))
    assert not provisioning.provision(instance)
    assert instance.state == State.PENDING


def test_a_process_whose_worker_died_before_recording_it_is_adopted() -> None:
    instance = started()
    pid = instance.pid
    Instance.objects.update(pid=None, start_ticks=None, boot_id="", shim_pid=None, shim_start_ticks=None)
    instance.refresh_from_db()
    settle(instance)
    assert (instance.state, instance.pid, instance.generation) == (State.READY, pid, 1)


def test_a_claim_whose_worker_died_before_the_spawn_is_given_up_after_a_while() -> None:
    instance = make_instance(State.STARTING, generation=1, port=20_001)
    assert provisioning.advance(instance) is not None
    Instance.objects.update(state_changed_at=timezone.now() - timedelta(minutes=1))
    instance.refresh_from_db()
    assert provisioning.advance(instance) is None
    assert instance.state == State.FAILED


def test_a_stop_without_gateways_ends_process_and_port_at_once() -> None:
    instance = ready()
    port = instance.port
    settle_stop(instance)
    assert instance.state == State.STOPPED
    assert provisioning.marked_processes() == []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_a_deaf_engine_is_killed_when_it_is_stopped() -> None:
    instance = settle_stop(ready("deaf"))
    assert instance.state == State.STOPPED
    assert provisioning.marked_processes() == []


def test_an_instance_drains_until_every_gateway_has_let_go_of_it() -> None:
    instance = ready()
    held = use_key(instance.pk, instance.generation, "gateway-1")
    coordination.client().set(held, "1", px=USE_LIFE_MS)
    assert provisioning.stop(instance) is not None
    assert instance.state == State.DRAINING
    assert provisioning.advance(instance) is not None
    assert Instance.objects.get().state == State.DRAINING
    coordination.client().delete(held)
    assert settle(instance).state == State.STOPPED


def test_a_drain_ends_with_its_grace_although_a_gateway_holds_on() -> None:
    instance = ready()
    held = use_key(instance.pk, instance.generation, "gateway-1")
    coordination.client().set(held, "1", px=USE_LIFE_MS)
    provisioning.stop(instance)
    Instance.objects.update(deadline_at=timezone.now())
    instance.refresh_from_db()
    assert settle(instance).state == State.STOPPED
    coordination.client().delete(held)


def test_a_stop_before_the_process_is_on_record_still_ends_it() -> None:
    instance = started()
    Instance.objects.update(pid=None, start_ticks=None, boot_id="", shim_pid=None, shim_start_ticks=None)
    instance.refresh_from_db()
    lifecycle.stopping(instance)
    assert settle(instance).state == State.STOPPED
    assert provisioning.marked_processes() == []


def test_a_killed_engine_is_noticed_and_said_to_be_killed() -> None:
    instance = ready()
    engine = provisioning.engine_of(instance)
    assert engine is not None
    send(engine, signal.SIGKILL)
    assert wait_gone(engine, PATIENCE_S)
    assert health.watch(instance.node.name) == 1
    instance.refresh_from_db()
    assert (instance.state, instance.exit_signal) == (State.FAILED, signal.SIGKILL)
    assert "SIGKILL" in instance.exit_reason
    assert provisioning.provision(instance)
    assert settle(instance).generation == 2


def test_a_killed_shim_is_noticed_and_takes_its_engine_along() -> None:
    instance = ready()
    owner, engine = provisioning.shim_of(instance), provisioning.engine_of(instance)
    assert owner is not None
    assert engine is not None
    send(owner, signal.SIGKILL)
    assert wait_gone(engine, PATIENCE_S)
    assert health.check(instance.node.name) == 1
    instance.refresh_from_db()
    assert instance.state == State.FAILED
    assert "shim" in instance.exit_reason


def test_an_engine_that_lives_but_never_answers_is_replaced_after_three_probes() -> None:
    instance = ready()
    engine = provisioning.engine_of(instance)
    assert engine is not None
    with socket.socket() as deaf:  # bound, not listening: connections are refused
        deaf.bind(("127.0.0.1", 0))
        Instance.objects.update(port=deaf.getsockname()[1])
        assert [health.check(instance.node.name) for _ in range(3)] == [0, 0, 1]
    instance.refresh_from_db()
    assert instance.state == State.FAILED
    assert "failed its probes" in instance.exit_reason
    assert not alive(engine)


def test_an_engine_that_has_work_but_stands_still_is_replaced(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    instance = ready()
    engine = provisioning.engine_of(instance)
    assert engine is not None
    send(engine, signal.SIGSTOP)
    monkeypatch.setattr(provisioning.probe, "__defaults__", (0.2,))
    # No gateway has said anything in this test, so for all we know it works for somebody.
    assert [health.check(instance.node.name) for _ in range(FAILED_PROBES + 1)] == [0] * (FAILED_PROBES + 1)
    settings.ASSISTANT_ENGINE_STILL_S = 0
    assert health.check(instance.node.name) == 1
    instance.refresh_from_db()
    assert (instance.state, instance.diagnosis) == (State.FAILED, "wedged")
    assert "did not compute" in instance.exit_reason
    assert not alive(engine)


def test_an_engine_that_computes_is_busy_until_nothing_has_come_of_it_for_too_long(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    instance = ready()
    engine = provisioning.engine_of(instance)
    assert engine is not None
    send(engine, signal.SIGSTOP)
    monkeypatch.setattr(provisioning.probe, "__defaults__", (0.2,))
    settings.ASSISTANT_ENGINE_STILL_S = 1
    long_ago = time.monotonic() - 200.0  # it had work then, and has used 100 s of a processor since
    coordination.keep_work_track(instance.pk, instance.generation, ["", long_ago, -100.0, long_ago], 10_000)
    assert health.check(instance.node.name) == 0
    coordination.keep_work_track(instance.pk, instance.generation, ["", long_ago, -100.0, long_ago], 10_000)
    settings.ASSISTANT_ENGINE_SILENT_S = 150
    assert health.check(instance.node.name) == 1
    instance.refresh_from_db()
    assert "although it computed" in instance.exit_reason


def test_how_a_process_is_doing_is_told() -> None:
    instance = ready()
    health.check(instance.node.name)
    known, unknown = coordination.health_reports([(instance.pk, instance.generation), (instance.pk, 99)])
    assert known is not None
    assert (known["verdict"], unknown) == ("well", None)


def test_a_healthy_engine_is_left_alone() -> None:
    instance = ready()
    assert (health.watch(instance.node.name), health.check(instance.node.name)) == (0, 0)


def test_processes_that_no_instance_accounts_for_are_strays() -> None:
    kept, lost = ready(), started_second()
    node = kept.node.name
    assert provisioning.find_strays(node) == []
    Instance.objects.filter(pk=lost.pk).delete()
    until = time.monotonic() + PATIENCE_S
    while len(strays := provisioning.find_strays(node)) < 2 and time.monotonic() < until:
        time.sleep(0.01)  # a process in the middle of its exec shows no environment
    assert {one.instance_id for one in strays} == {lost.pk}
    assert provisioning.end_strays(node) == len(strays) == 2
    assert all(wait_gone(one.process, PATIENCE_S) for one in strays)
    assert len(provisioning.living(kept)) == 2


def started_second() -> Instance:
    instance = make_instance(model=make_model("second", engine="toy", extra_args={"behaviour": "serve"}))
    provisioning.provision(instance)
    return instance


def test_an_earlier_generation_is_a_stray() -> None:
    instance = ready()
    Instance.objects.update(generation=2)
    assert len(provisioning.find_strays(instance.node.name)) == 2


def test_the_platform_s_end_leaves_no_engine_and_no_state_that_lies() -> None:
    running, loading = ready(), started_second()
    waiting = make_instance(model=make_model("third"))
    elsewhere = make_instance(State.READY, node=make_node("another"), model=waiting.model)
    provisioning.stop_everything(running.node.name, grace_s=5.0)
    states = dict(Instance.objects.values_list("pk", "state"))
    assert states[running.pk] == states[loading.pk] == State.STOPPED
    assert (states[waiting.pk], states[elsewhere.pk]) == (State.PENDING, State.READY)
    assert provisioning.marked_processes() == []
