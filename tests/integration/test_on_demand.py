"""Models that are loaded because somebody asks, unloaded when nobody does, and take turns in too little memory."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import httpx
import pytest

from tests.fakes import gguf_files
from tests.integration.fault_stage import Stage
from tests.running_platform import ROOT, wait_until

pytestmark = [pytest.mark.platform, pytest.mark.timeout(300)]
SOAK_S = float(os.environ.get("SOAK_S", "25"))  # by hand: 120
BIG_BYTES = 1_580_000_000  # what the admission takes one of the big models for
ON_DEMAND: dict[str, Any] = {"min_replicas": 0, "max_replicas": 1}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("d"))
    made.start()
    yield made
    made.close()


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=150) as opened:
        yield opened


def loads(stage: Stage, name: str) -> list[dict[str, object]]:
    return stage.rows("SELECT * FROM models_app_load WHERE model_name = ? ORDER BY id", name)


def test_a_request_for_a_model_that_is_not_loaded_waits_for_it_and_is_answered(stage: Stage, client: httpx.Client) -> None:
    stage.model("cold", {"load_s": 1.0}, **ON_DEMAND)
    assert stage.instances("cold") == []
    assert stage.ask("cold", stream=False) == ("ok", "")
    wait_until(lambda: [(one["cause"], one["stage"]) for one in loads(stage, "cold")] == [("demand", "ready")], 10, "its row")
    stage.remove("cold")


def test_who_will_not_wait_is_told_how_far_the_load_is_and_starts_it_all_the_same(stage: Stage, client: httpx.Client) -> None:
    stage.model("slow", {"load_s": 6.0}, **ON_DEMAND)
    body = {"model": "slow", "messages": [{"role": "user", "content": "hi"}]}
    headers = {"authorization": f"Bearer {stage.admin_key}", "prefer": "wait=2"}
    answer = client.post(f"{stage.platform.base_url}/v1/chat/completions", json=body, headers=headers)
    told = answer.json()
    assert (answer.status_code, told["error"]["code"]) == (503, "model_loading")
    assert int(answer.headers["retry-after"]) >= 1
    assert told["loading"]["state"] == "loading"
    assert 0.0 <= told["loading"]["progress"] < 1.0
    stage.wait("slow", "READY")
    number = stage.api("GET", "models/?name=slow")["results"][0]["id"]
    stage.api("POST", f"models/{number}/stop/")
    wait_until(lambda: not stage.instances("slow"), 30, "its end")
    stage.api("PATCH", f"models/{number}/", {"enabled": True})
    time.sleep(2.5)  # several rounds, in which nothing must be started
    assert stage.instances("slow") == []
    answer = client.post(f"{stage.platform.base_url}/v1/chat/completions", json=body, headers=headers)
    told = answer.json()
    assert told["loading"]["eta_s"] is not None, "the first load was not learned from"
    assert told["loading"]["eta_s"] < 10
    stage.remove("slow")


def test_a_model_nobody_asks_for_is_unloaded_and_one_that_is_asked_is_not(stage: Stage, client: httpx.Client) -> None:
    stage.model("idle", {"token_s": 0.1}, **ON_DEMAND, idle_timeout_s=3)
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            assert stage.ask("idle", max_tokens=30)[0] == "ok"

    asking = threading.Thread(target=keep_asking)
    asking.start()
    first = stage.wait("idle", "READY")
    time.sleep(8)  # longer than the time-out: it is asked all the while
    assert stage.instance("idle")["pid"] == first["pid"]
    assert stage.instance("idle")["state"] == "READY"
    stop.set()
    asking.join(60)
    wait_until(lambda: not stage.instances("idle"), 30, "the unload")
    stage.settled()
    assert stage.ask("idle")[0] == "ok"
    stage.remove("idle")


def test_a_pinned_model_stays_and_a_waiting_one_is_told_why(stage: Stage, client: httpx.Client) -> None:
    limit(stage, 1.4)
    big(stage, "pinned", pinned=True, min_replicas=1, max_replicas=1)
    stage.wait("pinned", "READY")
    big(stage, "second", **ON_DEMAND)
    how, detail = stage.ask("second", stream=False, prefer="wait=4")
    assert how in ("model_loading", "model_failed"), detail
    assert "GiB" in detail or "MiB" in detail
    assert stage.instance("pinned")["state"] == "READY"
    limit(stage, None)
    wait_until(lambda: stage.ask("second")[0] == "ok", 30, "the next look at the memory")
    stage.remove("pinned")
    stage.remove("second")


def big(stage: Stage, name: str, behaviour: dict[str, Any] | None = None, **fields: Any) -> None:
    """A model of about a GiB, by its header: the file is sparse and the stand-in takes nothing."""
    gguf_files.llama(stage.file(name), layers=4, embedding=4096, vocabulary=32000)
    stage.model(name, behaviour, file=stage.file(name), **fields)


def limit(stage: Stage, models: float | None) -> None:
    """Let the node take about so many of the big models."""
    (node,) = stage.api("GET", "nodes/")["results"]
    bytes_ = None if models is None else int(models * BIG_BYTES)
    stage.api("PATCH", f"nodes/{node['id']}/", {"memory_limit_bytes": bytes_})


def test_three_models_that_do_not_fit_together_take_turns(stage: Stage) -> None:
    limit(stage, 2.2)
    names = ["alpha", "beta", "gamma"]
    for name in names:
        big(stage, name, {"load_s": 0.5, "token_s": 0.02}, **ON_DEMAND)
    ended: Counter[str] = Counter()
    waits: list[float] = []
    wrong: list[str] = []
    until, stop = time.monotonic() + SOAK_S, threading.Event()

    def ask_in_turn(first: int) -> None:
        for name in islice(cycle(names), first, None):
            if time.monotonic() > until or stop.is_set():
                return
            began = time.monotonic()
            how, detail = stage.ask(name, stream=first % 2 == 0)
            ended[f"{name} {how}"] += 1
            waits.append(time.monotonic() - began)
            if how != "ok":
                wrong.append(f"{name} {how}: {detail}")

    threads = [threading.Thread(target=ask_in_turn, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    most, told = 0, set()
    try:
        while any(thread.is_alive() for thread in threads):
            most = max(most, len(stage.engines()))
            told |= {
                row["hold_reason"] for row in stage.rows("SELECT hold_reason FROM models_app_instance WHERE hold = 'memory'")
            }
            time.sleep(0.2)
    finally:
        stop.set()
    assert wrong == []
    assert all(ended[f"{name} ok"] > 0 for name in names), ended
    assert most <= 2, "more were loaded than fit"
    assert stage.rows("SELECT * FROM models_app_incident WHERE model_name IN ('alpha', 'beta', 'gamma')") == []
    assert any("memory" in line and any(name in line for name in names) for line in told), told
    loaded = {name: len(loads(stage, name)) for name in names}
    (ROOT / "build" / "turns.json").write_text(
        json.dumps({"ended": ended, "loads": loaded, "waits_s": sorted(round(wait, 1) for wait in waits), "told": sorted(told)})
    )
    limit(stage, None)
    for name in names:
        stage.remove(name)
    stage.settled()
