"""The whole platform with a real model: what a user sees, and what happens when something dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import psutil
import pytest

from models_app.contracts import key_material, secret_box
from tests.running_platform import MODEL, Platform, wait_until

pytestmark = [pytest.mark.platform, pytest.mark.timeout(180)]

LONG = {"messages": [{"role": "user", "content": "Write a very long story about a lighthouse."}], "max_tokens": 1500}


@pytest.fixture
def client(platform: Platform) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{platform.base_url}/v1", api_key=platform.key, max_retries=0, timeout=60) as opened:
        yield opened


def row(platform: Platform, query: str, *values: Any) -> tuple[Any, ...]:
    database = sqlite3.connect(f"file:{platform.home}/assistant.sqlite3?mode=ro", uri=True)
    try:
        return tuple(database.execute(query, values).fetchone())
    finally:
        database.close()


def busy_slots(platform: Platform) -> int:
    """How many slots the engine itself says it is working on, asked past the gateway with the engine's own key."""
    port, sealed = row(platform, "SELECT port, engine_secret FROM models_app_instance WHERE state = 'READY'")
    secret = secret_box.unseal((platform.home / "secrets" / "secret_key").read_text().strip(), sealed)
    slots = httpx.get(f"http://127.0.0.1:{port}/slots", headers={"authorization": f"Bearer {secret}"}, timeout=10).json()
    return sum(slot["is_processing"] for slot in slots)


def open_stream(platform: Platform, **body: Any) -> tuple[socket.socket, Any]:
    """A raw streamed request: the socket and a file of its answer, positioned after the first content."""
    payload = json.dumps({"model": MODEL, "stream": True, **LONG, **body}).encode()
    sock = socket.create_connection(("127.0.0.1", platform.http_port), timeout=60)
    sock.sendall(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {platform.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
        + payload
    )
    answer = sock.makefile("rb")
    for line in answer:
        if b'"content":"' in line:
            break
    return sock, answer


def test_the_openai_client_gets_the_models_own_words_with_usage(platform: Platform, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "What color is the sky on a clear day?"}], max_tokens=24, temperature=0
    )
    assert "sky" in (answer.choices[0].message.content or "")
    assert answer.model == MODEL
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 5
    assert answer.usage.completion_tokens > 3


def test_the_openai_client_streams_under_an_alias_with_usage(platform: Platform, client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "What color is the sky on a clear day?"}],
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "sky" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert {chunk.model for chunk in chunks} == {"demo"}
    assert chunks[-1].usage is not None
    assert chunks[-1].choices == []


def test_text_completions_and_the_model_list_work(platform: Platform, client: openai.OpenAI) -> None:
    done = client.completions.create(model=MODEL, prompt="One, two, three,", max_tokens=8, temperature=0)
    assert "four" in done.choices[0].text
    assert {"demo", MODEL} <= {model.id for model in client.models.list()}
    assert client.models.retrieve(MODEL).id == MODEL


def test_wrong_requests_get_the_right_error_classes(platform: Platform, client: openai.OpenAI) -> None:
    wrong = client.with_options(api_key=key_material.generate().text)  # shares the client's connections
    with pytest.raises(openai.AuthenticationError) as caught:
        wrong.models.list()
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "x"}])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages="hello")  # type: ignore[arg-type]


def test_no_key_and_malformed_json_get_error_objects(platform: Platform) -> None:
    url = f"{platform.base_url}/v1/chat/completions"
    nobody = httpx.post(url, json={})
    assert nobody.status_code == 401
    assert nobody.headers["www-authenticate"] == "Bearer"
    broken = httpx.post(url, content=b'{"model": ', headers={"authorization": f"Bearer {platform.key}"})
    assert broken.status_code == 400
    for answer in (nobody, broken):
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["x-request-id"]


def test_a_client_that_hangs_up_frees_the_engines_slot(platform: Platform) -> None:
    sock, answer = open_stream(platform)
    assert busy_slots(platform) == 1
    answer.close()
    sock.close()
    # The promise is a second, and the answer would have taken many; a busy machine gets more.
    wait_until(lambda: busy_slots(platform) == 0, 4, "the slot to be freed")


def test_every_request_is_accounted_for(platform: Platform) -> None:
    answer = platform.chat()
    request_id = answer.headers["x-request-id"]
    columns = "end_reason, status, prompt_tokens, completion_tokens, model_name, key_id"
    query = f"SELECT {columns} FROM models_app_usageevent WHERE request_id = ?"

    def ingested() -> bool:
        try:
            row(platform, query, request_id)
        except TypeError:
            return False
        return True

    wait_until(ingested, 30, "the usage event")
    end, status, prompt, completion, model, key = row(platform, query, request_id)
    assert (end, status, model) == (answer.json()["choices"][0]["finish_reason"], 200, MODEL)
    usage = answer.json()["usage"]
    assert (prompt, completion) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert key is not None


def test_grpc_streams_chunks_as_they_are_produced(platform: Platform) -> None:
    from gateway_app.rpc import assistant_pb2, assistant_pb2_grpc

    request = assistant_pb2.Request(
        path="/v1/chat/completions",
        method="POST",
        headers={"authorization": f"Bearer {platform.key}", "content-type": "application/json"},
        body=json.dumps({"model": MODEL, "stream": True, **LONG, "max_tokens": 150}).encode(),
    )
    arrivals: list[float] = []
    body = b""
    with grpc.insecure_channel(f"127.0.0.1:{platform.grpc_port}") as channel:
        stub = assistant_pb2_grpc.AssistantServiceStub(channel)  # type: ignore[no-untyped-call]
        for message in stub.ForwardRequestStream(request, timeout=60):
            if not arrivals:
                assert message.status == 200
                assert message.headers["content-type"].startswith("text/event-stream")
            arrivals.append(time.monotonic())
            body += message.body
        metadata = (("authorization", f"Bearer {platform.key}"),)
        info = stub.GetInfo(assistant_pb2.InfoRequest(), metadata=metadata, timeout=10)
    assert body.rstrip().endswith(b"data: [DONE]")
    assert len(arrivals) > 20
    assert arrivals[-1] - arrivals[1] > 0.3
    assert MODEL in info.models


def test_nothing_is_readable_by_others_and_valkey_has_no_port(platform: Platform) -> None:
    files = [
        platform.home / "assistant.sqlite3",
        *platform.home.glob("assistant.sqlite3-*"),
        *(platform.home / "secrets").iterdir(),
    ]
    assert len(files) > 4
    assert {path.name for path in files if stat.S_IMODE(path.stat().st_mode) != 0o600} == set()
    assert stat.S_IMODE(platform.home.stat().st_mode) == 0o700
    valkeys = platform.processes("valkey-server")
    assert len(valkeys) == 1
    assert [
        connection for connection in valkeys[0].net_connections() if connection.family in {socket.AF_INET, socket.AF_INET6}
    ] == []
    specs = list((platform.home / "instances").rglob("*.json"))
    assert specs
    assert {path.name for path in specs if stat.S_IMODE(path.stat().st_mode) != 0o600} == set()


def test_no_secret_stands_in_a_command_line_or_log(platform: Platform) -> None:
    secrets = [path.read_text().strip() for path in (platform.home / "secrets").iterdir()]
    sealed = row(platform, "SELECT engine_secret FROM models_app_instance WHERE state = 'READY'")[0]
    secrets.append(secret_box.unseal((platform.home / "secrets" / "secret_key").read_text().strip(), sealed))
    lines = "\n".join(" ".join(process.cmdline()) for process in platform.processes())
    logs = "".join(path.read_text(errors="replace") for path in platform.home.rglob("*.log"))
    assert lines
    for secret in secrets:
        assert secret not in lines
        assert secret not in logs


def test_an_engine_killed_mid_stream_ends_the_stream_with_an_error_and_is_restarted(platform: Platform) -> None:
    before = platform.engine().pid
    sock, answer = open_stream(platform)
    os.kill(before, signal.SIGKILL)
    rest = answer.read()
    sock.close()
    assert b"upstream_stream_interrupted" in rest
    assert b"[DONE]" not in rest
    again = platform.chat()
    assert again.status_code == 200, again.text
    assert platform.engine().pid != before
    reason = row(platform, "SELECT exit_reason, generation FROM models_app_instance WHERE state = 'READY'")
    assert reason[1] >= 2


def celery_processes(platform: Platform, word: str) -> list[psutil.Process]:
    return platform.processes("assistant_site.celery", word)


@pytest.mark.parametrize("part", ["worker", "beat"])
def test_a_killed_worker_or_beat_interrupts_nothing_and_adopts_the_engine(platform: Platform, part: str) -> None:
    engine = platform.engine().pid
    old = {process.pid for process in celery_processes(platform, part)}
    assert old
    for process in celery_processes(platform, part):
        process.kill()
    assert platform.chat().status_code == 200
    wait_until(lambda: {process.pid for process in celery_processes(platform, part)} - old, 30, f"a new {part}")
    assert platform.chat().status_code == 200
    time.sleep(6)  # longer than every reconcile and health period: time enough to do harm
    assert platform.engine().pid == engine
    assert platform.chat().status_code == 200


def test_a_killed_console_or_gateway_comes_back(platform: Platform) -> None:
    for part in ("console", "gateway"):
        victims = platform.processes("manage.py", part)
        assert len(victims) == 1
        victims[0].kill()
        wait_until(lambda: _status(f"{platform.base_url}/admin/login/") == 200, 60, f"the {part}")
    assert platform.chat().status_code == 200


def _status(url: str) -> int:
    try:
        return httpx.get(url, timeout=5).status_code
    except httpx.HTTPError:
        return 0


@pytest.fixture
def stopped_valkey(platform: Platform) -> Iterator[None]:
    process = platform.processes("valkey-server")[0]
    process.suspend()
    yield
    process.resume()


def make_key(platform: Platform, name: str) -> str:
    done = platform.command("create_api_key", "--user", "admin", "--name", name, "--scope", "inference", "--scope", "admin")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return done.stdout.strip()


def revoke(platform: Platform, key: str) -> None:
    """Through the REST API, as a script would."""
    headers = {"authorization": f"Bearer {key}"}
    public_id = key.split("_")[1]
    keys = httpx.get(f"{platform.base_url}/api/v1/keys/", headers=headers, timeout=20).json()["results"]
    (mine,) = [item for item in keys if item["public_id"] == public_id]
    assert httpx.post(f"{platform.base_url}/api/v1/keys/{mine['id']}/revoke/", headers=headers, timeout=20).status_code == 200


def wait_until_refused(platform: Platform, key: str) -> None:
    """The promise is a second; a busy machine gets more."""
    url, headers = f"{platform.base_url}/v1/models", {"authorization": f"Bearer {key}"}
    wait_until(lambda: httpx.get(url, headers=headers, timeout=20).status_code == 401, 4, "the revoked key to be refused")


def test_a_revoked_key_is_refused_within_a_second(platform: Platform) -> None:
    key = make_key(platform, "short-lived")
    assert platform.chat(key=key).status_code == 200
    revoke(platform, key)
    wait_until_refused(platform, key)


def test_a_revoked_key_is_refused_within_a_second_without_valkey(platform: Platform, stopped_valkey: None) -> None:
    key = make_key(platform, "short-lived without valkey")
    assert platform.chat(key=key).status_code == 200
    revoke(platform, key)
    wait_until_refused(platform, key)


def bindable(port: int) -> bool:
    """A dying process loses its command line a moment before its sockets; finished connections may linger in TIME_WAIT."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def test_a_disabled_model_stops_and_an_enabled_one_is_served_again(platform: Platform) -> None:
    key = make_key(platform, "operator")
    headers = {"authorization": f"Bearer {key}"}
    (model,) = httpx.get(f"{platform.base_url}/api/v1/models/?name={MODEL}", headers=headers).json()["results"]
    url = f"{platform.base_url}/api/v1/models/{model['id']}"
    port = row(platform, "SELECT port FROM models_app_instance WHERE state = 'READY'")[0]
    assert httpx.post(f"{url}/stop/", headers=headers).status_code in {200, 202}
    wait_until(lambda: not platform.processes("embedded_server"), 30, "the engine to be gone")
    wait_until(lambda: bindable(port), 10, "its port to be free")
    assert platform.chat().status_code in {404, 503}
    assert httpx.post(f"{url}/start/", headers=headers).status_code in {200, 202}
    wait_until(lambda: platform.chat().status_code == 200, 60, "the model to be served again")


def test_a_second_up_on_the_same_home_says_so_and_exits(platform: Platform) -> None:
    done = platform.command("up")
    assert done.returncode != 0
    assert platform.process is not None
    assert f"pid {platform.process.pid}" in done.stdout + done.stderr
    assert platform.chat().status_code == 200


def test_up_killed_hard_leaves_an_engine_that_the_next_up_adopts(demo_model: Path, tmp_path: Path) -> None:
    own = Platform(tmp_path / "h", server="uvicorn")
    own.start(demo_model)
    assert own.process is not None
    engine = own.engine().pid
    own.process.kill()
    own.process.wait()
    own.start(demo_model)
    assert own.engine().pid == engine
    assert own.chat().status_code == 200
    assert own.stop() == 0
    assert own.processes() == []
