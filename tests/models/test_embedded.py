"""The embedded engine: what it refuses, what it is launched with, what it takes for ready, and the real thing."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import xllamacpp
from pytest_django.fixtures import Settings

from models_app import engine_access, provisioning
from models_app.contracts import secret_box
from models_app.engines import gguf
from models_app.engines.base import Health, Launch, ModelSpec, Target
from models_app.engines.embedded import EmbeddedEngine
from models_app.engines.embedded_options import OPTIONS, check_options
from models_app.exceptions import PreflightError
from models_app.models import Instance, State
from tests.fakes import gguf_files
from tests.models.instances import make_instance, make_model
from tests.models.test_provisioning import settle

ENGINE = EmbeddedEngine(engine_access.engine_settings())


def spec(path: Path | None, **changes: Any) -> ModelSpec:
    values: dict[str, Any] = {
        "name": "smol",
        "part": "chat",
        "chat_model_path": path,
        "embedding_model_path": None,
        "tts_model_path": None,
        "prompt_template": "",
        "ctx_size": 1024,
        "batch_size": 256,
        "slots": 3,
        "threads": 0,
        "gpu_layers": 0,
        **changes,
    }
    return ModelSpec(**values)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    return gguf_files.llama(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "saved web answer"),
        (b"Entry not found", "saved web answer"),
        (b'{"error": "gated"}', "saved web answer"),
        (b"version https://git-lfs.github.com/spec/v1", "saved web answer"),
        (b"PK\x03\x04zip", "not a GGUF file"),
    ],
)
def test_a_file_that_is_no_model_is_refused_with_what_it_is(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(PreflightError, match=told):
        gguf.check(file)


def test_a_sound_model_passes(model_file: Path) -> None:
    ENGINE.preflight(spec(model_file, prompt_template="chatml", extra_args={"cache_ram_mib": 0, "cache_type_k": "q8_0"}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"chat_model_path": None}, "needs chat_model_path"),
        ({"part": "embedding"}, "needs embedding_model_path"),
        ({"part": "speech"}, "does not speak; leave tts_model_path empty"),
        ({"part": "whole"}, "switch one_process off"),
        ({"prompt_template": "nosuch"}, "“nosuch” is not built in"),
        ({"extra_args": {"port": 1}}, "“port” is not an allowed setting; allowed are: cache_idle_slots"),
        ({"extra_args": {"temp": 1}}, "“temp” is not an allowed setting; did you mean sampling.temp"),
        ({"extra_args": {"draft_model": "/nowhere.gguf"}}, "/nowhere.gguf cannot be read"),
        ({"extra_args": {"lora": [{"path": "/nowhere.gguf"}]}}, "/nowhere.gguf cannot be read"),
    ],
)
def test_what_cannot_start_here_is_refused_with_a_remedy(model_file: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(PreflightError, match=told):
        ENGINE.preflight(spec(model_file, **changes) if "chat_model_path" not in changes else spec(None))


def test_the_library_is_told_with_its_version() -> None:
    assert ENGINE.installed() == f"xllamacpp {xllamacpp.__version__}"


FORBIDDEN = "hostnames port api_keys api_prefix public_path slot_save_path log_json model hf_token mcp_servers_json server_tools"


@pytest.mark.parametrize("name", [*FORBIDDEN.split(), "models_dir", "media_path", "ssl_file_key", "sampling", "__class__", ""])
def test_addresses_keys_files_and_tools_can_never_be_set(name: str) -> None:
    with pytest.raises(PreflightError, match="not an allowed setting"):
        check_options({name: True})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_ubatch", 0), ("n_ubatch", True), ("n_ubatch", 1.5), ("n_ubatch", "1"), ("warmup", 1), ("cache_type_k", "q9"),
        ("cache_type_k", ["f16"]), ("sampling.temp", float("nan")), ("sampling.temp", -1), ("numa", None),
        ("rope_freq_base", True), ("cpus", "3-1"), ("cpus", "0-512"), ("cpus", "all"), ("lora", []), ("lora", ["a.gguf"]),
        ("lora", [{"path": "a", "scale": True}]), ("lora", [{"path": "a", "url": "b"}]), ("mmproj", ""), ("tensor_split", [0, 0]),
        ("speculative", ["draft_simple", "draft_simple"]), ("sampling.samplers", ["magic"]), ("chat_template_kwargs", {"a": [1]}),
        ("sampling.grammar", "-root"), ("pooling_type", "none"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_or_size_is_refused(name: str, value: Any) -> None:
    with pytest.raises(PreflightError, match=re.escape(f"“{name}” must be {OPTIONS[name]}")):
        check_options({name: value})


def test_the_key_is_in_the_spec_file_alone_and_the_context_is_per_slot(model_file: Path) -> None:
    command = ENGINE.command(Launch(spec(model_file), 7, 2, 20_007, "sekret", Path("/run/7/2")))
    assert "sekret" not in " ".join(command.argv)
    assert command.argv[-1] == "/run/7/2"
    assert any("embedded_server" in part for part in command.argv)
    written = json.loads(command.files["spec.json"])
    assert (written["api_key"], written["port"], written["n_ctx"], written["n_parallel"]) == ("sekret", 20_007, 3072, 3)


# Probe


class Slots:
    """A server on a free port whose /slots answers as the test says, by whether the key came along."""

    def __init__(self, answer: Callable[[bool], tuple[int, bytes]]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = answer(self.headers.get("Authorization") == "Bearer sekret")
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def probe(self, proven: bool = False) -> tuple[Health, int | None]:
        with httpx.Client(timeout=0.3, trust_env=False) as client:
            found = ENGINE.probe(Target("127.0.0.1", self.server.server_port, "sekret", "smol", proven), client)
        return found.health, found.slots_busy

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def slots() -> Iterator[Callable[[Callable[[bool], tuple[int, bytes]]], Slots]]:
    servers: list[Slots] = []

    def start(answer: Callable[[bool], tuple[int, bytes]]) -> Slots:
        servers.append(Slots(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


TWO_SLOTS = b'[{"is_processing": true}, {"is_processing": false}]'


@pytest.mark.parametrize(
    ("answer", "health", "busy"),
    [
        (lambda keyed: (200, TWO_SLOTS) if keyed else (401, b"{}"), Health.READY, 1),
        (lambda keyed: (503, b"{}"), Health.LOADING, None),
        (lambda keyed: (200, TWO_SLOTS), Health.WRONG_SERVER, None),
        (lambda keyed: (401, b"{}"), Health.WRONG_SERVER, None),
        (lambda keyed: (404, b"{}"), Health.WRONG_SERVER, None),
        (lambda keyed: (200, b"<html>") if keyed else (401, b""), Health.WRONG_SERVER, None),
        (lambda keyed: (200, b"[1]") if keyed else (401, b""), Health.WRONG_SERVER, None),
    ],
)
def test_ready_needs_our_key_to_open_what_is_closed_without_it(
    slots: Callable[..., Slots], answer: Callable[[bool], tuple[int, bytes]], health: Health, busy: int | None
) -> None:
    assert slots(answer).probe() == (health, busy)


def test_a_process_that_was_ready_is_asked_with_its_key_alone(slots: Callable[..., Slots]) -> None:
    asked: list[bool] = []

    def answer(keyed: bool) -> tuple[int, bytes]:
        asked.append(keyed)
        return 200, TWO_SLOTS

    assert slots(answer).probe(proven=True) == (Health.READY, 1)
    assert asked == [True]
    assert slots(lambda keyed: (401, b"{}")).probe(proven=True)[0] == Health.WRONG_SERVER


def test_no_answer_in_time_is_busy_and_no_listener_is_unreachable(slots: Callable[..., Slots]) -> None:
    release = threading.Event()

    def hang(_: bool) -> tuple[int, bytes]:
        release.wait(10)
        return 200, b"[]"

    server = slots(hang)
    assert server.probe()[0] == Health.BUSY
    release.set()
    server.close()
    with httpx.Client(timeout=0.3, trust_env=False) as client:
        gone = ENGINE.probe(Target("127.0.0.1", server.server.server_port, "sekret", "smol"), client)
    assert gone.health == Health.UNREACHABLE


# The real engine


@pytest.fixture
def real(settings: Settings, tmp_path: Path, demo_model: Path) -> Iterator[Callable[..., Instance]]:
    settings.ASSISTANT_INSTANCES_DIR = tmp_path / "instances"
    settings.ASSISTANT_MODEL_DIRS = [demo_model.parent]
    instances: list[Instance] = []

    def start(**fields: Any) -> Instance:
        instance = make_instance(model=make_model(chat_model_path=str(demo_model), **{"ctx_size": 512, "slots": 2, **fields}))
        instances.append(instance)
        assert provisioning.provision(instance), instance.exit_reason
        return settle(instance)

    yield start
    for instance in instances:
        assert provisioning.kill(instance)


@pytest.mark.engine
@pytest.mark.django_db
@pytest.mark.usefixtures("valkey")
class TestRealEngine:
    def address(self, instance: Instance, path: str) -> str:
        return f"http://127.0.0.1:{instance.port}{path}"

    def key(self, instance: Instance, settings: Settings) -> dict[str, str]:
        return {"Authorization": "Bearer " + secret_box.unseal(settings.SECRET_KEY, instance.engine_secret)}

    def test_it_becomes_ready_serves_with_its_key_alone_and_ends_at_once_while_it_generates(
        self, real: Callable[..., Instance], settings: Settings
    ) -> None:
        instance = real(extra_args={"cache_ram_mib": 0, "sampling.temp": 0.0})
        assert instance.state == State.READY, instance.exit_reason
        key = self.key(instance, settings)
        with httpx.Client(trust_env=False, timeout=30) as client:
            slots = client.get(self.address(instance, "/slots"), headers=key).json()
            assert [slot["n_ctx"] for slot in slots] == [512, 512]
            for path in ("/slots", "/props", "/metrics"):
                assert client.get(self.address(instance, path)).status_code == 401
            chat = {"messages": [{"role": "user", "content": "Count to a thousand."}], "max_tokens": 400, "stream": True}
            with client.stream("POST", self.address(instance, "/v1/chat/completions"), headers=key, json=chat) as stream:
                lines = stream.iter_lines()
                assert next(lines).startswith("data: ")
                assert provisioning.probe(instance).slots_busy == 1
                provisioning.stop(instance)
                settle(instance)
                assert instance.state == State.STOPPED
                with pytest.raises(httpx.HTTPError):
                    list(lines)

    def test_a_built_in_template_by_name_works(self, real: Callable[..., Instance], settings: Settings) -> None:
        instance = real(prompt_template="llama2")
        assert instance.state == State.READY, instance.exit_reason
        chat = {"messages": [{"role": "user", "content": "Hi"}]}
        with httpx.Client(trust_env=False, timeout=30) as client:
            prompt = client.post(self.address(instance, "/apply-template"), headers=self.key(instance, settings), json=chat)
        assert "[INST]" in prompt.json()["prompt"]

    def test_an_unknown_kind_of_model_fails_with_what_the_engine_said(self, settings: Settings, tmp_path: Path) -> None:
        settings.ASSISTANT_INSTANCES_DIR, settings.ASSISTANT_MODEL_DIRS = tmp_path / "instances", [tmp_path]
        file = gguf_files.write(tmp_path / "odd.gguf", {"general.architecture": "oddity"}, {"x": ((32,), gguf_files.F32)})
        instance = make_instance(model=make_model(chat_model_path=str(file)))
        assert provisioning.provision(instance), instance.exit_reason
        settle(instance)
        assert (instance.state, instance.exit_code) == (State.FAILED, 1)
        assert "unknown model architecture: 'oddity'" in instance.exit_log
