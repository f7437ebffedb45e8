"""Each thing that may go wrong, done to a running platform: what clients saw, how long it took, what was left behind.

The table of docs/operations.md is written from what these tests record (fault_stage.py says where).
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.fakes import gguf_files
from tests.integration.fault_stage import Clients, Stage
from tests.running_platform import wait_until

pytestmark = [pytest.mark.platform, pytest.mark.timeout(240)]
SLOW = {"token_s": 0.05}  # an answer of twenty tokens takes a second


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("f"), ASSISTANT_ENGINE_STILL_S="20")
    made.start()
    yield made
    made.close()


@pytest.mark.parametrize(("number", "diagnosis"), [(signal.SIGKILL, "killed"), (signal.SIGSEGV, "crashed")])
def test_an_engine_that_dies_costs_what_was_in_flight_on_it_and_nothing_else(
    stage: Stage, number: signal.Signals, diagnosis: str
) -> None:
    name = f"dies-of-{number.name.lower()}"
    stage.ready_model(name, SLOW)
    with Clients(stage, name).running() as clients:
        wait_until(lambda: clients.ended["ok"] >= 4, 30, "answers")
        before = stage.instance(name)
        died = time.monotonic()
        stage.process(before).send_signal(number)
        recovery = clients.recovered_s(died)
        after = stage.wait(name, "READY")
    assert (after["generation"], after["state"]) == (before["generation"] + 1, "READY")
    assert clients.lost <= 4
    assert set(clients.ended) <= {"ok", "cut", "upstream_error"}, clients.details
    assert stage.incidents(name)[0]["diagnosis"] == diagnosis
    stage.record(
        f"engine ends by {number.name}",
        clients,
        recovery,
        "running streams end with an error event; later requests wait",
        "READY",
    )
    stage.remove(name)


def test_a_shim_that_is_killed_takes_its_engine_with_it_and_both_come_back(stage: Stage) -> None:
    stage.ready_model("shimless", SLOW)
    with Clients(stage, "shimless").running() as clients:
        wait_until(lambda: clients.ended["ok"] >= 4, 30, "answers")
        before = stage.instance("shimless")
        died = time.monotonic()
        stage.process(before, "shim_pid").kill()
        recovery = clients.recovered_s(died)
        after = stage.wait("shimless", "READY")
    assert after["generation"] == before["generation"] + 1
    assert not psutil.pid_exists(before["pid"]) or stage.process(before).create_time() > time.time() - 60
    assert clients.lost <= 4
    stage.record("shim killed", clients, recovery, "as when the engine dies", "READY")
    stage.remove("shimless")


def test_an_engine_that_ends_while_it_loads_is_tried_again_and_explained(stage: Stage) -> None:
    words = ["llama_model_load: error loading model: unknown model architecture: 'future'"]
    number = stage.model("stillborn", {"exit_at_load": 1, "say": words})
    wait_until(lambda: len(stage.incidents("stillborn")) >= 2, 30, "the second try")
    seen = stage.incidents("stillborn")[0]
    assert seen["diagnosis"] == "unsupported_model"
    assert "future" in seen["reason"]
    stage.script("stillborn")
    mended = time.monotonic()
    stage.api("POST", f"models/{number}/restart/")
    stage.wait("stillborn", "READY")
    recovery = time.monotonic() - mended
    assert stage.ask("stillborn")[0] == "ok"
    stage.record("engine exits at load", None, recovery, "waits; 503 model_failed once it is given up", "FAILED with the reason")
    stage.remove("stillborn")


def test_an_engine_that_never_gets_ready_is_ended_at_its_deadline(stage: Stage) -> None:
    """The passing of the five minutes is emulated by moving the deadline in the row."""
    stage.model("endless", {"never_ready": True})
    row = stage.wait("endless", "STARTING")
    wait_until(lambda: stage.instance("endless")["pid"], 20, "its process")
    pid = stage.instance("endless")["pid"]
    stage.write("UPDATE models_app_instance SET deadline_at = started_at WHERE id = ?", row["id"])
    seen = stage.first_incident("endless")
    assert seen["diagnosis"] == "start_timeout"
    assert "still loading" in seen["reason"]
    wait_until(lambda: not psutil.pid_exists(pid), 10, "its end")
    stage.record(
        "engine never ready", None, None, "waits as for a load; 503 model_loading with progress", "FAILED with the last line"
    )
    stage.remove("endless")


def test_a_server_that_does_not_know_our_key_is_never_taken_for_our_engine(stage: Stage) -> None:
    stage.model("stranger", {"other_key": True})
    assert stage.first_incident("stranger")["diagnosis"] == "wrong_server"
    assert not [row for row in stage.rows("SELECT * FROM models_app_instance WHERE model_name = 'stranger'") if row["ready_at"]]
    stage.record("wrong server on the port", None, None, "nothing is sent to it", "FAILED: another program answers")
    stage.remove("stranger")


def test_a_port_that_is_taken_is_named_and_waited_for(stage: Stage) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        stage.model("ported", port=port)
        row = stage.wait("ported", "FAILED")
        assert str(os.getpid()) in row["exit_reason"]
        assert str(port) in row["exit_reason"]
    freed = time.monotonic()
    stage.wait("ported", "READY")
    stage.record(
        "port taken", None, time.monotonic() - freed, "waits, or 503 with the reason", "FAILED naming the holder, then READY"
    )
    stage.remove("ported")


def test_a_model_that_can_never_fit_is_refused_with_the_numbers(stage: Stage) -> None:
    (node,) = stage.api("GET", "nodes/")["results"]
    gguf_files.llama(stage.file("giant"), layers=4, embedding=4096, vocabulary=32000)
    stage.api("PATCH", f"nodes/{node['id']}/", {"memory_limit_bytes": 200 << 20})
    stage.model("giant", file=stage.file("giant"))
    row = stage.wait("giant", "FAILED")
    assert row["diagnosis"] == "memory"
    assert "needs" in row["exit_reason"]
    how, detail = stage.ask("giant")
    assert how == "model_failed", detail
    assert "needs" in detail
    stage.api("PATCH", f"nodes/{node['id']}/", {"memory_limit_bytes": None})
    freed = time.monotonic()
    stage.wait("giant", "READY")
    stage.record("memory too small", None, time.monotonic() - freed, "503 model_failed with the numbers", "FAILED, then READY")
    stage.remove("giant")


@pytest.mark.parametrize("damage", ["corrupt", "truncated"])
def test_a_damaged_model_file_is_told_apart_and_tried_again_once_mended(stage: Stage, damage: str) -> None:
    name = f"file-{damage}"
    number = stage.ready_model(name)
    good = stage.file(name).read_bytes()
    stage.file(name).write_bytes(b"<html>Entry not found</html>" if damage == "corrupt" else good[: len(good) // 2])
    stage.process(stage.instance(name)).kill()
    row = stage.wait(name, "FAILED")
    wait_until(lambda: "download it again" in stage.instance(name)["exit_reason"], 20, "the reason")
    row = stage.instance(name)
    assert ("truncated" in row["exit_reason"]) == (damage == "truncated")
    how, detail = stage.ask(name, prefer="wait=1")
    assert how in ("model_failed", "model_loading"), detail
    stage.file(name).write_bytes(good)
    mended = time.monotonic()
    stage.wait(name, "READY")
    stage.record(f"model file {damage}", None, time.monotonic() - mended, "503 with the reason", "FAILED, then READY by itself")
    assert number
    stage.remove(name)


def test_a_missing_program_is_named_and_found_again(stage: Stage) -> None:
    stage.ready_model("programless")
    hidden = stage.program.with_name("hidden")
    stage.program.rename(hidden)
    stage.process(stage.instance("programless")).kill()
    wait_until(lambda: "ASSISTANT_LLAMA_SERVER" in stage.instance("programless")["exit_reason"], 20, "the reason")
    hidden.rename(stage.program)
    back = time.monotonic()
    stage.wait("programless", "READY")
    stage.record("binary missing", None, time.monotonic() - back, "503 with the remedy", "FAILED, then READY by itself")
    stage.remove("programless")


def test_a_missing_plugin_is_named_before_a_model_is_saved_and_when_it_goes_later(stage: Stage) -> None:
    described = {"name": "sandboxed", "engine": "wasmedge", "chat_model_path": "sandboxed.gguf", "prompt_template": "chatml"}
    gguf_files.llama(stage.file("sandboxed"))
    stage.wasmedge.behave({"plugin": "missing"})
    refused = stage.api("POST", "models/", described, expected=400)
    assert "wasi_nn" in str(refused)
    stage.wasmedge.behave({"plugin": "missing", "at_launch": True})
    stage.api("POST", "models/", described)
    stage.wait("sandboxed", "FAILED")
    assert stage.incidents("sandboxed")[0]["diagnosis"] == "missing_plugin"
    stage.wasmedge.behave({})
    mended = time.monotonic()
    stage.wait("sandboxed", "READY")
    stage.record(
        "plugin missing",
        None,
        time.monotonic() - mended,
        "nothing can be saved; 503 with the remedy later",
        "FAILED, then READY by itself",
    )
    stage.remove("sandboxed")


def test_a_worker_killed_in_the_middle_of_a_load_loses_nothing(stage: Stage) -> None:
    stage.model("orphaned-load", {"load_s": 4.0})
    row = stage.wait("orphaned-load", "STARTING")
    wait_until(lambda: stage.instance("orphaned-load")["pid"], 20, "its process")
    pid = stage.instance("orphaned-load")["pid"]
    for worker in stage.platform.processes("celery", "control,node."):
        worker.kill()
    killed = time.monotonic()
    after = stage.wait("orphaned-load", "READY")
    assert (after["pid"], after["generation"]) == (pid, row["generation"] or 1)
    stage.record("worker killed during a load", None, time.monotonic() - killed, "waits for the load", "READY, same process")
    stage.remove("orphaned-load")


def test_beat_may_die_while_everything_is_served(stage: Stage) -> None:
    stage.ready_model("steady", SLOW)
    pid = stage.instance("steady")["pid"]
    with Clients(stage, "steady").running() as clients:
        wait_until(lambda: clients.ended["ok"] >= 4, 30, "answers")
        stage.program_of("celery", "beat").kill()
        killed = time.monotonic()
        stage.ready_model("after-beat")
        recovery = time.monotonic() - killed
    assert clients.lost == 0, clients.details
    assert stage.instance("steady")["pid"] == pid
    stage.record("beat killed", clients, recovery, "nothing", "READY, same process")
    stage.remove("steady")
    stage.remove("after-beat")


def test_valkey_may_be_killed_while_everything_is_served(stage: Stage) -> None:
    stage.ready_model("steady", SLOW)
    pid = stage.instance("steady")["pid"]
    with Clients(stage, "steady").running() as clients:
        wait_until(lambda: clients.ended["ok"] >= 4, 30, "answers")
        stage.program_of("valkey-server").kill()
        killed = time.monotonic()
        stage.model("after-valkey")
        stage.wait("after-valkey", "READY")
        recovery = time.monotonic() - killed
        answered = clients.ended["ok"]
        wait_until(lambda: clients.ended["ok"] > answered + 4, 30, "more answers")
    assert clients.lost == 0, clients.details
    assert stage.instance("steady")["pid"] == pid
    stage.record("Valkey killed", clients, recovery, "nothing", "READY, same process")
    stage.remove("steady")
    stage.remove("after-valkey")


def test_an_engine_goes_on_although_its_log_cannot_be_written(stage: Stage) -> None:
    """A full disk is emulated by a limit on the size of the shim's files: writes fail in the same place, with another number."""
    stage.ready_model("chatty", SLOW)
    row = stage.instance("chatty")
    shim = stage.process(row, "shim_pid")
    shim.rlimit(psutil.RLIMIT_FSIZE, (1, 1))
    with Clients(stage, "chatty").running() as clients:
        wait_until(lambda: clients.ended["ok"] >= 8, 60, "answers")
        stage.process(row).kill()
        died = time.monotonic()
        recovery = clients.recovered_s(died)
        after = stage.wait("chatty", "READY")
    assert after["generation"] == row["generation"] + 1
    assert clients.lost <= 4
    stage.record("disk full for logs", clients, recovery, "nothing until the engine is killed", "READY; the log is cut off")
    stage.remove("chatty")


def test_a_lone_engine_that_stands_still_with_a_request_is_replaced(stage: Stage) -> None:
    """Stopped with SIGSTOP; the two minutes of patience are twenty seconds on this stage."""
    stage.ready_model("frozen", SLOW)
    before = stage.instance("frozen")
    with Clients(stage, "frozen").running() as clients:
        wait_until(lambda: clients.ended["ok"] >= 4, 30, "answers")
        stage.process(before).suspend()
        froze = time.monotonic()
        wait_until(lambda: stage.instance("frozen")["generation"] > before["generation"], 90, "its replacement")
        recovery = clients.recovered_s(froze)
    assert stage.incidents("frozen")[0]["diagnosis"] == "wedged"
    assert clients.lost <= 4
    stage.record("engine stands still", clients, recovery, "its streams stop, then end with an error event", "READY")
    stage.remove("frozen")


def test_the_stage_leaves_no_strays(stage: Stage) -> None:
    wait_until(lambda: not stage.engines(), 30, "the end of every engine")
    assert stage.orphans() == []


def test_a_database_restart_is_not_noticed_by_clients(tmp_path: Path) -> None:
    from tests import postgres

    with postgres.serving() as server:
        stage = Stage(tmp_path, DATABASE_URL=server.url)
        stage.start()
        try:
            _restart_database(stage, server)
        finally:
            stage.close()


def _restart_database(stage: Stage, server: object) -> None:
    from tests.postgres import Server

    assert isinstance(server, Server)
    model = stage.model("steady", SLOW)
    with Clients(stage, "steady").running() as clients:
        wait_until(lambda: clients.ended["ok"] >= 4, 60, "answers")
        server.stop()
        stopped = time.monotonic()
        answered = clients.ended["ok"]
        wait_until(lambda: clients.ended["ok"] > answered + 8, 60, "answers without a database")
        server.start()
        wait_until(lambda: _ready(stage, model), 60, "the model's state")
        recovery = time.monotonic() - stopped
    assert clients.lost == 0, clients.details
    stage.record_row("database restarted", clients, recovery, "nothing", "READY, same process")


def _ready(stage: Stage, model: int) -> bool:
    answer = httpx.get(
        f"{stage.platform.base_url}/api/v1/models/{model}/", headers={"authorization": f"Bearer {stage.admin_key}"}, timeout=30
    )
    return answer.status_code == 200 and answer.json()["state"] == "ready"


@pytest.mark.parametrize("step_s", [7200, -14400])
def test_a_step_of_the_clock_ends_nothing_and_stops_nothing(tmp_path: Path, step_s: int) -> None:
    """The wall clock of every process of the platform is stepped; the machine's own is left alone."""
    clock = pytest.importorskip("libfaketime")
    library = next(Path(clock.__file__).parent.rglob("libfaketime.so.1"), None)
    if library is None:
        pytest.skip("libfaketime comes without its library here")
    offset = tmp_path / "offset"
    offset.write_text("+0\n")
    # The offset is looked up once a second; at every call it would make the whole platform slow.
    stage = Stage(
        tmp_path,
        LD_PRELOAD=str(library),
        FAKETIME_TIMESTAMP_FILE=str(offset),
        FAKETIME_CACHE_DURATION="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
        FAKETIME_FORCE_MONOTONIC_FIX="0",
    )
    stage.start()
    try:
        stage.ready_model("steady", SLOW)
        before = stage.instance("steady")
        with Clients(stage, "steady").running() as clients:
            wait_until(lambda: clients.ended["ok"] >= 4, 60, "answers")
            offset.write_text(f"{step_s:+d}\n")
            stepped = time.monotonic()
            answered = clients.ended["ok"]
            wait_until(lambda: clients.ended["ok"] > answered + 20, 60, "answers after the step")
            assert clients.lost == 0, clients.details
            assert stage.instance("steady")["pid"] == before["pid"]
            stage.process(before).kill()
            died = time.monotonic()
            recovery = clients.recovered_s(died)
            stage.ready_model("after-step")
        assert clients.lost <= 4
        assert died > stepped
        stage.record(
            f"clock stepped by {step_s // 3600:+d} h", clients, recovery, "nothing; then as when the engine dies", "READY"
        )
    finally:
        stage.close()
