"""The wasmedge engine's whole life on real processes under real shims. WasmEdge is a stand-in (tests/fakes/wasmedge.py)."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from django.core.exceptions import ValidationError
from pytest_django.fixtures import Settings

from models_app import model_preflight, ports, provisioning, runtime_folder
from models_app.contracts.traits import WHOLE
from models_app.engines.base import Health
from models_app.models import Instance, ModelConfig, State
from models_app.process_identity import alive, send, wait_gone
from tests.fakes import gguf_files
from tests.fakes.wasmedge import Behaviour, Installation, install
from tests.models.instances import make_instance, make_model

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("valkey")]
PATIENCE_S = 30.0
CHAT = {"model": "smol", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


@pytest.fixture
def wasmedge(settings: Settings, tmp_path: Path) -> Iterator[Installation]:
    """The stand-in set up as the settings say, with a model file for every role; every process it left is ended."""
    installation = install(tmp_path / "wasmedge")
    settings.ASSISTANT_WASMEDGE = str(installation.program)
    settings.ASSISTANT_WASM_FILE = installation.wasm
    settings.ASSISTANT_WASM_SHA256 = installation.sha256
    settings.ASSISTANT_INSTANCES_DIR = tmp_path / "instances"
    settings.ASSISTANT_MODEL_DIRS = [tmp_path]
    for name in ("smol", "embed", "speech", "codec"):
        gguf_files.llama(tmp_path / f"{name}.gguf")
    yield installation
    for stray in provisioning.marked_processes():
        send(stray.process, signal.SIGKILL)
        assert wait_gone(stray.process, PATIENCE_S)


def model(**fields: Any) -> ModelConfig:
    return make_model(**{"engine": "wasmedge", "prompt_template": "chatml", "ctx_size": 512, **fields})


def started(config: ModelConfig, part: str = "chat") -> Instance:
    instance = make_instance(model=config, part=part)
    assert provisioning.provision(instance), instance.exit_reason
    return instance


def settle(instance: Instance) -> Instance:
    until = time.monotonic() + PATIENCE_S
    while (again := provisioning.advance(instance)) is not None:
        assert time.monotonic() < until, instance.state
        time.sleep(min(again, 0.05))
    instance.refresh_from_db()
    return instance


def ready(config: ModelConfig, part: str = "chat") -> Instance:
    instance = settle(started(config, part))
    assert instance.state == State.READY, (instance.exit_reason, instance.exit_log)
    return instance


def post(instance: Instance, path: str, body: dict[str, Any]) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=20) as client:
        return client.post(f"http://127.0.0.1:{instance.port}{path}", json=body)


def events(answer: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in answer.text.splitlines() if line]


@pytest.mark.usefixtures("wasmedge")
def test_a_model_starts_serves_a_chat_and_leaves_nothing_when_it_stops() -> None:
    instance = ready(model(slots=4))
    engine = provisioning.engine_of(instance)
    assert engine is not None
    assert instance.slots == 1
    words = psutil.Process(engine.pid).cmdline()
    assert f".:{provisioning.folder_of(instance)}" in words
    streamed = events(post(instance, "/v1/chat/completions", {**CHAT, "stream": True}))
    assert streamed[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0] for event in streamed[:-1]]
    assert "".join(one["delta"]["content"] for one in deltas) == "Hello from the stand-in."
    provisioning.stop(instance)
    settle(instance)
    assert instance.state == State.STOPPED
    assert not alive(engine)
    assert ports.bindable(instance.port or 0)
    assert provisioning.marked_processes() == []


def test_it_is_starting_while_it_loads_and_listens_only_afterwards(wasmedge: Installation, tmp_path: Path) -> None:
    gate = tmp_path / "loaded"
    wasmedge.behave({"load_gate": str(gate)})
    instance = started(model())
    until = time.monotonic() + PATIENCE_S
    while not runtime_folder.last_log_lines(provisioning.folder_of(instance), 1):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert provisioning.advance(instance) is not None
    assert (instance.state, provisioning.probe(instance).health) == (State.STARTING, Health.UNREACHABLE)
    gate.touch()
    assert settle(instance).state == State.READY


@pytest.mark.usefixtures("wasmedge")
def test_chat_and_embedding_of_one_model_are_two_processes() -> None:
    config = model(embedding_model_path="embed.gguf")
    assert config.parts == ("chat", "embedding")
    chat, embedding = ready(config), ready(config, "embedding")
    assert chat.pid != embedding.pid
    vectors = post(embedding, "/v1/embeddings", {"input": ["a", "b"]}).json()["data"]
    assert [one["index"] for one in vectors] == [0, 1]
    refused = post(chat, "/v1/embeddings", {"input": ["a"]})
    assert (refused.status_code, refused.text) == (500, "500 Internal Server Error: There is no available embedding model")
    provisioning.stop(chat)
    settle(chat)
    assert provisioning.probe(embedding).health == Health.READY


@pytest.mark.usefixtures("wasmedge")
def test_one_process_serves_both_where_the_administrator_wants_that() -> None:
    config = model(embedding_model_path="embed.gguf", one_process=True)
    assert config.parts == (WHOLE,)
    instance = ready(config, WHOLE)
    assert post(instance, "/v1/chat/completions", CHAT).json()["choices"][0]["message"]["content"]
    assert post(instance, "/v1/embeddings", {"input": "a"}).json()["data"]


@pytest.mark.usefixtures("wasmedge")
def test_speech_is_served_from_its_config_file() -> None:
    config = model(
        chat_model_path="", tts_model_path="speech.gguf", prompt_template="", extra_args={"codec_model_path": "codec.gguf"}
    )
    instance = ready(config, "speech")
    written = provisioning.folder_of(instance) / "llama-api-server.toml"
    assert written.stat().st_mode & 0o777 == 0o600
    answer = post(instance, "/v1/audio/speech", {"input": "Hello"})
    assert answer.content.startswith(b"RIFF")
    assert answer.content.endswith(bytes(4096))


@pytest.mark.usefixtures("wasmedge")
def test_all_three_roles_fit_into_one_process() -> None:
    config = model(
        embedding_model_path="embed.gguf",
        tts_model_path="speech.gguf",
        one_process=True,
        extra_args={"codec_model_path": "codec.gguf"},
    )
    instance = ready(config, WHOLE)
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/embeddings", {"input": "a"}), ("/v1/audio/speech", {"input": "a"})):
        assert post(instance, path, body).status_code == 200


@pytest.mark.usefixtures("wasmedge")
def test_a_path_among_the_extra_arguments_is_confined_as_model_paths_are() -> None:
    config = model(extra_args={"mmproj_path": "/etc/passwd"})
    instance = make_instance(model=config)
    assert not provisioning.provision(instance)
    instance.refresh_from_db()
    assert "/etc/passwd is outside the folders for model files" in instance.exit_reason


# What goes wrong


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [
        ({"plugin": "missing"}, "no wasi_nn-ggml plugin"),
        ({"plugin": "library"}, "the library libopenblas.so.0 is missing"),
        ({"imports": "unknown"}, "wasi_ephemeral_nn.unload (“unknown import”)"),
        ({"version": "0.12.0"}, "WasmEdge 0.12.0 is too old"),
    ],
)
def test_what_is_missing_here_is_said_before_anything_starts(wasmedge: Installation, behaviour: Behaviour, told: str) -> None:
    wasmedge.behave(behaviour)
    instance = make_instance(model=model())
    assert not provisioning.provision(instance)
    instance.refresh_from_db()
    assert instance.state == State.FAILED
    assert told in instance.exit_reason
    assert provisioning.marked_processes() == []


def test_a_form_is_told_the_same(wasmedge: Installation) -> None:
    wasmedge.behave({"plugin": "missing"})
    with pytest.raises(ValidationError, match="no wasi_nn-ggml plugin"):
        model_preflight.check_model(model(), ["ctx_size"])


@contextlib.contextmanager
def taken(port: int) -> Iterator[None]:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        yield


def test_a_port_that_was_taken_meanwhile_is_told_by_the_engine_s_own_end(wasmedge: Installation, tmp_path: Path) -> None:
    wasmedge.behave({"load_gate": str(tmp_path / "go")})
    instance = started(model())
    with taken(instance.port or 0):
        (tmp_path / "go").touch()
        settle(instance)
    assert (instance.state, instance.diagnosis) == (State.FAILED, "port_taken")
    assert str(instance.port) in instance.exit_reason


@pytest.mark.parametrize(("content", "diagnosis"), [(b"<html>moved</html>", "not_a_model"), (b"GGUF\3\0\0\0", "truncated_model")])
def test_a_model_file_that_is_replaced_during_the_start_is_told(
    wasmedge: Installation, tmp_path: Path, content: bytes, diagnosis: str
) -> None:
    wasmedge.behave({"load_gate": str(tmp_path / "go")})
    instance = started(model())
    (tmp_path / "smol.gguf").write_bytes(content)
    (tmp_path / "go").touch()
    settle(instance)
    assert (instance.state, instance.diagnosis) == (State.FAILED, diagnosis)
    assert "smol.gguf" in instance.exit_reason


@pytest.mark.parametrize(
    ("behaviour", "diagnosis", "told"),
    [
        ({"plugin": "missing", "at_launch": True}, "missing_plugin", "wasi_nn-ggml plugin"),
        ({"imports": "unknown", "at_launch": True}, "unknown_import", "wasi_ephemeral_nn: unload"),
        ({"unknown_flags": ["--ubatch-size"]}, "unknown_option", "--ubatch-size"),
        ({"crash": int(signal.SIGSEGV)}, "crashed", "lower ctx_size"),
    ],
)
def test_what_breaks_after_the_preflight_has_its_own_diagnosis(
    wasmedge: Installation, behaviour: Behaviour, diagnosis: str, told: str
) -> None:
    wasmedge.behave(behaviour)
    instance = settle(started(model()))
    assert (instance.state, instance.diagnosis) == (State.FAILED, diagnosis), instance.exit_log
    assert told in instance.exit_reason


def test_an_engine_with_another_model_is_never_taken_for_ours(wasmedge: Installation) -> None:
    wasmedge.behave({"name": "another"})
    instance = started(model())
    until = time.monotonic() + PATIENCE_S
    while (found := provisioning.probe(instance)).health != Health.WRONG_SERVER:
        assert time.monotonic() < until, found
        time.sleep(0.02)
    assert found.detail == "serves another, not smol"
    provisioning.advance(instance)
    assert instance.state == State.STARTING


def test_while_it_computes_it_answers_nobody_which_is_busy(wasmedge: Installation) -> None:
    wasmedge.behave({"words": ["a"] * 40, "word_s": 0.05})
    instance = ready(model())
    with httpx.Client(trust_env=False, timeout=20) as client:
        address = f"http://127.0.0.1:{instance.port}/v1/chat/completions"
        with client.stream("POST", address, json={**CHAT, "stream": True}) as stream:
            lines = stream.iter_lines()
            assert next(lines)
            assert provisioning.probe(instance, timeout_s=0.2).health == Health.BUSY
            assert list(lines)[-2] == "data: [DONE]"
    assert provisioning.probe(instance).health == Health.READY


# The stand-in itself


def run(wasmedge: Installation, *words: str) -> tuple[int, str]:
    done = subprocess.run(
        [str(wasmedge.program), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=20
    )
    return done.returncode, done.stdout


COMMON = ["--batch-size", "8", "--ubatch-size", "8", "--socket-addr", "127.0.0.1:1"]


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--no-such-flag"], 2, "error: unexpected argument '--no-such-flag' found"),
        (["--n-predict", "-1"], 2, "error: unexpected argument '-1' found"),
        (["--threads"], 2, "a value is required for '--threads <VALUE>'"),
        (["--prompt-template", "nosuch"], 2, "invalid value 'nosuch' for '--prompt-template <VALUE>'"),
        (["--model-name", "a,b", "--prompt-template", "chatml"], 1, "model names and prompt templates must be the same"),
        (["--model-name", "a", "--model-alias", "x", "--prompt-template", "chatml", "--ctx-size", "1,2", *COMMON], 1, "panicked"),
        (["--model-name", "a", "--model-alias", "x", "--prompt-template", "chatml", "--ctx-size", "1", *COMMON], 1, "preloaded"),
        (["config", "--file", "x.toml", "--chat"], 1, "No such file or directory"),
        (["config", "--file", "x.toml"], 1, "Specify at least one"),
    ],
)
def test_the_stand_in_is_as_strict_as_the_real_one(wasmedge: Installation, flags: list[str], code: int, told: str) -> None:
    ended, text = run(wasmedge, "--dir", ".:/tmp", "--env", "LLAMA_LOG=warn", str(wasmedge.wasm), *flags)
    assert ended == code, text
    assert told in text


def test_the_stand_in_speaks_the_dialect_that_a_gateway_must_repair(wasmedge: Installation) -> None:
    wasmedge.behave({"context_full": True})
    instance = ready(model())
    wrong = post(instance, "/v1/chat/completions", {**CHAT, "stop": "x"})
    assert wrong.status_code == 400
    assert wrong.text.startswith("400 Bad Request: Failed to deserialize chat completion request")
    assert '"content":"Hi"' in wrong.text.replace(" ", "")
    chunks = [
        json.loads(event)["choices"][0] for event in events(post(instance, "/v1/chat/completions", {**CHAT, "stream": True}))[:-1]
    ]
    assert {one["delta"]["role"] for one in chunks} == {"assistant"}
    assert {one["finish_reason"] for one in chunks} == {None}
    assert chunks[0]["delta"]["content"] == ""
    assert chunks[-1]["delta"]["content"] == "<|WASMEDGE-GGML-CONTEXT-FULL|>"
    assert post(instance, "/v1/completions", {"prompt": "a", "stream": True}).json()["object"] == "text_completion"
    assert post(instance, "/v1/nothing", {}).text.startswith("404 The requested service endpoint is not found")
    with pytest.raises(httpx.HTTPError):
        post(instance, "/v1/responses", {"input": "a", "stream": True})
    engine = provisioning.engine_of(instance)
    assert engine is not None
    assert wait_gone(engine, PATIENCE_S)
