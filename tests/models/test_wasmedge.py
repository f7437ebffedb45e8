"""The wasmedge engine: command lines, what it refuses, what it takes for ready. WasmEdge itself is a stand-in (tests/fakes)."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models_app.contracts.traits import CHAT, COMPLETIONS, EMBEDDINGS, SPEECH, TRAITS
from models_app.engines import wasmedge_launch
from models_app.engines.base import EngineSettings, Health, Installable, Launch, ModelSpec, Target
from models_app.engines.registry import adapter
from models_app.engines.wasmedge import WasmEdgeEngine
from models_app.engines.wasmedge_options import OPTIONS, TEMPLATES, check_options
from models_app.exceptions import PreflightError
from tests.fakes import gguf_files
from tests.fakes.wasmedge import Behaviour, Installation, install

FOLDER = Path("/run/assistant/7/2")


@dataclasses.dataclass
class Node:
    """A stand-in WasmEdge with files for every role."""

    installation: Installation
    chat: Path
    embedding: Path
    speech: Path
    codec: Path

    def settings(self, **changes: Any) -> EngineSettings:
        values: dict[str, Any] = {
            "wasmedge": str(self.installation.program),
            "wasm_file": self.installation.wasm,
            "wasm_sha256": self.installation.sha256,
            "llama_server": "llama-server",
        }
        return EngineSettings(**{**values, **changes})

    def engine(self, **changes: Any) -> WasmEdgeEngine:
        return WasmEdgeEngine(self.settings(**changes))

    def spec(self, *roles: str, **changes: Any) -> ModelSpec:
        values: dict[str, Any] = {
            "name": "org/smol:q4",
            "part": roles[0] if len(roles) == 1 else "whole",
            "chat_model_path": self.chat if "chat" in roles else None,
            "embedding_model_path": self.embedding if "embedding" in roles else None,
            "tts_model_path": self.speech if "speech" in roles else None,
            "prompt_template": "chatml",
            "ctx_size": 2048,
            "batch_size": 256,
            "slots": 1,
            "threads": 4,
            "gpu_layers": 0,
            **changes,
        }
        return ModelSpec(**values)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(
        install(tmp_path / "wasmedge"),
        chat=gguf_files.llama(tmp_path / "chat.gguf"),
        embedding=gguf_files.llama(tmp_path / "embed.gguf", context_length=512),
        speech=gguf_files.llama(tmp_path / "speech.gguf"),
        codec=gguf_files.llama(tmp_path / "codec.gguf"),
    )


def argv(node: Node, spec: ModelSpec) -> list[str]:
    return node.engine().command(Launch(spec, 7, 2, 21_007, "sekret", FOLDER)).argv


# Command lines


def test_chat_is_launched_with_one_value_in_every_list(node: Node) -> None:
    assert argv(node, node.spec("chat")) == [
        str(node.installation.program),
        "--dir", f".:{FOLDER}",
        "--env", "LLAMA_LOG=warn",
        "--nn-preload", f"default:GGML:AUTO:{node.chat}",
        str(node.installation.wasm),
        "--model-name", "org/smol:q4",
        "--model-alias", "default",
        "--prompt-template", "chatml",
        "--ctx-size", "2048",
        "--batch-size", "256",
        "--ubatch-size", "256",
        "--threads", "4",
        "--n-gpu-layers", "0",
        "--socket-addr", "127.0.0.1:21007",
    ]  # fmt: skip


def test_embedding_alone_has_the_template_embedding_and_a_batch_as_large_as_the_context_it_was_trained_for(node: Node) -> None:
    assert argv(node, node.spec("embedding", prompt_template=""))[5:] == [
        "--nn-preload", f"embedding:GGML:AUTO:{node.embedding}",
        str(node.installation.wasm),
        "--model-name", "org/smol:q4",
        "--model-alias", "embedding",
        "--prompt-template", "embedding",
        "--ctx-size", "512",
        "--batch-size", "512",
        "--ubatch-size", "512",
        "--threads", "4",
        "--n-gpu-layers", "0",
        "--socket-addr", "127.0.0.1:21007",
    ]  # fmt: skip


def test_chat_and_embedding_in_one_process_have_two_values_in_every_list(node: Node) -> None:
    extra = {"embedding_ctx_size": 384, "embedding_batch_size": 320, "ubatch_size": 128}
    assert argv(node, node.spec("chat", "embedding", extra_args=extra))[5:] == [
        "--nn-preload", f"default:GGML:AUTO:{node.chat}",
        "--nn-preload", f"embedding:GGML:AUTO:{node.embedding}",
        str(node.installation.wasm),
        "--model-name", "org/smol:q4,org/smol:q4",
        "--model-alias", "default,embedding",
        "--prompt-template", "chatml,embedding",
        "--ctx-size", "2048,384",
        "--batch-size", "256,320",
        "--ubatch-size", "128,320",
        "--threads", "4",
        "--n-gpu-layers", "0",
        "--socket-addr", "127.0.0.1:21007",
    ]  # fmt: skip


EVERYTHING = {
    "frequency_penalty": -0.5, "grammar": 'root ::= "a"', "include_usage": True, "json_schema": "{}", "main_gpu": 1,
    "n_predict": -2, "no_mmap": False, "presence_penalty": 0.5, "repeat_penalty": 1.2, "reverse_prompt": "user:",
    "split_mode": "row", "temp": 0.0, "tensor_split": [3, 2.5], "top_p": 0.9,
}  # fmt: skip


def test_further_settings_are_single_words_so_that_a_negative_value_is_no_flag(node: Node) -> None:
    words = argv(node, node.spec("chat", gpu_layers=-1, extra_args={**EVERYTHING, "mmproj_path": "/m/eye.gguf"}))
    assert words[words.index("--n-gpu-layers") + 1] == "999"
    assert words[words.index("--socket-addr") + 2 :] == [
        "--frequency-penalty=-0.5", '--grammar=root ::= "a"', "--json-schema={}", "--main-gpu=1", "--llava-mmproj=/m/eye.gguf",
        "--n-predict=-2", "--no-mmap=false", "--presence-penalty=0.5", "--repeat-penalty=1.2", "--reverse-prompt=user:",
        "--split-mode=row", "--temp=0.0", "--tensor-split=3,2.5", "--top-p=0.9", "--include-usage",
    ]  # fmt: skip


def test_every_allowed_setting_reaches_the_engine_in_one_of_the_two_modes(node: Node) -> None:
    paths = {"codec_model_path": "/m/codec.gguf", "mmproj_path": "/m/eye.gguf", "speaker_path": "/m/voice.json"}
    extra = {**EVERYTHING, **paths, "embedding_ctx_size": 384, "embedding_batch_size": 320, "ubatch_size": 64}
    assert extra.keys() == OPTIONS.keys()
    spec = node.spec("chat", "embedding", "speech", extra_args=extra)
    config = tomllib.loads(wasmedge_launch.config_file(spec, 21_007, None))
    assert config == {
        "server": {"socket_addr": "127.0.0.1:21007"},
        "chat": {
            "model_name": "org/smol:q4", "model_alias": "default", "ctx_size": 2048, "batch_size": 256, "ubatch_size": 64,
            "threads": 4, "split_mode": "row", "main_gpu": 1, "tensor_split": "3,2.5", "prompt_template": "chatml",
            "n_predict": -2, "n_gpu_layers": 0, "no_mmap": False, "temp": 0.0, "top_p": 0.9, "repeat_penalty": 1.2,
            "presence_penalty": 0.5, "frequency_penalty": -0.5, "grammar": 'root ::= "a"', "json_schema": "{}",
            "llava_mmproj": "/m/eye.gguf", "include_usage": True, "reverse_prompt": "user:",
        },
        "embedding": {
            "model_name": "org/smol:q4", "model_alias": "embedding", "ctx_size": 384, "batch_size": 320, "ubatch_size": 320,
            "prompt_template": "embedding", "threads": 4, "split_mode": "row", "main_gpu": 1, "tensor_split": "3,2.5",
        },
        "tts": {
            "model_name": "org/smol:q4", "model_alias": "tts", "ctx_size": 2048, "batch_size": 2048, "ubatch_size": 2048,
            "codec_model": "/m/codec.gguf", "speaker_file": "/m/voice.json", "output_file": "output.wav", "n_predict": -2,
            "n_gpu_layers": 0, "temp": 0.0,
        },
    }  # fmt: skip


def test_speech_is_launched_from_a_file_in_the_runtime_folder(node: Node) -> None:
    spec = node.spec("speech", prompt_template="", extra_args={"codec_model_path": str(node.codec)})
    command = node.engine().command(Launch(spec, 7, 2, 21_007, "sekret", FOLDER))
    assert command.argv[1:] == [
        "--dir", f".:{FOLDER}",
        "--env", "LLAMA_LOG=warn",
        "--nn-preload", f"tts:GGML:AUTO:{node.speech}",
        str(node.installation.wasm),
        "config", "--file", "llama-api-server.toml", "--tts",
    ]  # fmt: skip
    config = tomllib.loads(command.files["llama-api-server.toml"])
    assert list(config) == ["server", "chat", "embedding", "tts"]
    assert config["chat"]["prompt_template"] == "none"
    assert "reverse_prompt" not in config["chat"]


def test_all_three_in_one_process_are_launched_from_the_file(node: Node) -> None:
    spec = node.spec("chat", "embedding", "speech", extra_args={"codec_model_path": str(node.codec)})
    words = argv(node, spec)
    assert words[words.index("config") :] == ["config", "--file", "llama-api-server.toml", "--chat", "--embedding", "--tts"]
    assert [words[at + 1].split(":")[0] for at, word in enumerate(words) if word == "--nn-preload"] == [
        "default",
        "embedding",
        "tts",
    ]


@given(st.text(min_size=1, max_size=40).filter(OPTIONS["grammar"].accepts))
def test_any_allowed_text_survives_the_config_file(text: str) -> None:
    spec = ModelSpec("m", "speech", None, None, Path("/t"), "", 64, 1, 1, 0, 0, {"grammar": text, "codec_model_path": text})
    config = tomllib.loads(wasmedge_launch.config_file(spec, 1, None))
    assert (config["chat"]["grammar"], config["tts"]["codec_model"]) == (text, text)


def test_threads_are_never_left_to_the_engine_and_no_secret_is_in_sight(node: Node) -> None:
    spec = node.spec("chat", threads=0)
    command = node.engine().command(Launch(spec, 7, 2, 21_007, "sekret", FOLDER))
    threads = int(command.argv[command.argv.index("--threads") + 1])
    assert 1 <= threads <= wasmedge_launch.MOST_THREADS
    assert "sekret" not in json.dumps([command.argv, command.env, command.files])
    assert command.env == {"LLAMA_LOG": "warn"}


def test_traits_say_what_the_gateway_must_know() -> None:
    traits = TRAITS["wasmedge"]
    assert traits.endpoints == {CHAT, COMPLETIONS, EMBEDDINGS, SPEECH}
    assert (traits.cancel, traits.dialect, traits.max_slots) == ("none", "llama-api-server", 1)


# Preflight


def test_a_complete_installation_passes_for_every_part(node: Node) -> None:
    engine = adapter("wasmedge", node.settings())
    assert isinstance(engine, Installable)
    assert engine.installed() == "WasmEdge 0.14.1, llama-api-server 0.28.0"
    engine.preflight(node.spec("chat"))
    engine.preflight(node.spec("embedding", prompt_template=""))
    engine.preflight(node.spec("speech", prompt_template="", extra_args={"codec_model_path": str(node.codec)}))


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [
        ({"version": "0.13.5"}, r"WasmEdge 0\.13\.5 is too old; install 0\.14\.1 or newer"),
        ({"plugin": "missing"}, r"no wasi_nn-ggml plugin.*unknown option: nn-preload.*WASMEDGE_PLUGIN_PATH"),
        ({"plugin": "library"}, r"because the library libopenblas\.so\.0 is missing; install the package"),
        ({"imports": "unknown"}, r"does not fit this WasmEdge: it asks for wasi_ephemeral_nn\.unload .*unknown import.*pin"),
        ({"server_version": "0.14.15"}, r"llama-api-server 0\.14\.15 is too old; pin 0\.16\.9 or newer"),
        ({"version": "unheard-of"}, r"is not WasmEdge .*it said:.*install WasmEdge with its wasi_nn-ggml plugin"),
    ],
)
def test_each_gap_of_the_installation_has_its_own_sentence(node: Node, behaviour: Behaviour, told: str) -> None:
    node.installation.behave(behaviour)
    with pytest.raises(PreflightError, match=told):
        node.engine().preflight(node.spec("chat"))


def test_a_repaired_installation_is_seen_at_once_and_a_broken_one_too(node: Node) -> None:
    node.installation.behave({"imports": "unknown"})
    with pytest.raises(PreflightError, match="unknown import"):
        node.engine().preflight(node.spec("chat"))
    node.installation.behave({})
    node.engine().preflight(node.spec("chat"))
    node.installation.behave({"plugin": "missing"})
    with pytest.raises(PreflightError, match="no wasi_nn-ggml plugin"):
        node.engine().preflight(node.spec("chat"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"wasmedge": "no-such-wasmedge"}, r"no-such-wasmedge is not on PATH; install WasmEdge.*ASSISTANT_WASMEDGE\.$"),
        ({"wasmedge": "/no/such/wasmedge"}, r"/no/such/wasmedge is no program that can be run; install WasmEdge"),
        ({"wasm_sha256": ""}, r"ASSISTANT_WASM_SHA256 is empty, and nothing unpinned is run: set it to.*SHA256SUM"),
        ({"wasm_sha256": "ABC"}, r"ASSISTANT_WASM_SHA256 is not 64 lower-case hexadecimal digits"),
        (
            {"wasm_sha256": "0" * 64},
            r"not the pinned file \(its SHA-256 is [0-9a-f]{64}\); remove it and run manage\.py fetch_engine",
        ),
        ({"wasm_file": Path("/no/such.wasm")}, r"/no/such\.wasm is missing; run manage\.py fetch_engine"),
        ({"wasm_file": Path("/")}, r"/ cannot be read \(Is a directory\)"),
    ],
)
def test_settings_that_lead_nowhere_are_told_with_a_remedy(node: Node, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(PreflightError, match=told):
        node.engine(**changes).preflight(node.spec("chat"))


def test_a_wasm_file_that_changes_after_it_was_verified_is_noticed(node: Node) -> None:
    node.engine().preflight(node.spec("chat"))
    node.installation.wasm.write_bytes(b"\0asm and something else")
    with pytest.raises(PreflightError, match="is not the pinned file"):
        node.engine().preflight(node.spec("chat"))


def test_a_program_that_does_not_run_or_lacks_a_library_is_told(node: Node, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    with pytest.raises(PreflightError, match=r"broken cannot be run \(No such file or directory\); check"):
        node.engine(wasmedge=str(broken)).preflight(node.spec("chat"))
    broken.write_text(
        "#!/bin/sh\necho 'wasmedge: error while loading shared libraries: libwasmedge.so.0: cannot open' >&2; exit 127\n"
    )
    with pytest.raises(PreflightError, match=r"needs the library libwasmedge\.so\.0, which is missing"):
        node.engine(wasmedge=str(broken)).preflight(node.spec("chat"))


@pytest.mark.parametrize(
    ("roles", "changes", "told"),
    [
        (["chat"], {"prompt_template": ""}, r"needs prompt_template for a chat model; choose one of: baichuan-2,"),
        (["chat"], {"prompt_template": "llama2"}, r"prompt_template “llama2” is not known to the wasmedge engine; choose"),
        (["chat"], {"prompt_template": "embedding"}, r"“embedding” is not known"),
        (["speech"], {}, r"needs a second model file.*extra_args as “codec_model_path”"),
        (["chat"], {"extra_args": {"port": 8080}}, r"“port” is not an allowed setting; allowed are: codec_model_path"),
    ],
)
def test_a_model_it_could_not_serve_is_refused(node: Node, roles: list[str], changes: dict[str, Any], told: str) -> None:
    with pytest.raises(PreflightError, match=told):
        node.engine().preflight(node.spec(*roles, **changes))


def test_files_that_are_no_models_or_have_a_colon_in_their_path_are_refused(node: Node, tmp_path: Path) -> None:
    page = tmp_path / "page.gguf"
    page.write_text("Entry not found")
    with pytest.raises(PreflightError, match="saved web answer"):
        node.engine().preflight(node.spec("embedding", embedding_model_path=page))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(node.chat.read_bytes()[:-100])
    with pytest.raises(PreflightError, match="truncated"):
        node.engine().preflight(node.spec("chat", chat_model_path=cut))
    with pytest.raises(PreflightError, match="has a colon in its path"):
        node.engine().preflight(node.spec("chat", chat_model_path=gguf_files.llama(tmp_path / "a:b.gguf")))


FORBIDDEN = "socket_addr port api_key web_ui log_all log_prompts dir env model_name model_alias config"


@pytest.mark.parametrize("name", [*FORBIDDEN.split(), "--temp", "ctx_size", "__class__", ""])
def test_address_key_log_and_directories_can_never_be_set(name: str) -> None:
    with pytest.raises(PreflightError, match="not an allowed setting"):
        check_options({name: "x"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_predict", -3), ("n_predict", "1"), ("temp", -0.1), ("temp", True), ("top_p", 1.1), ("split_mode", "column"),
        ("reverse_prompt", ""), ("reverse_prompt", "-x"), ("grammar", "a\0b"), ("grammar", "\ud800"), ("json_schema", {}),
        ("tensor_split", [0, 0]), ("tensor_split", "1,2"), ("tensor_split", [1, -1]), ("no_mmap", 1), ("main_gpu", 128),
        ("embedding_ctx_size", 1), ("codec_model_path", 7), ("codec_model_path", ""),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_or_size_is_refused(name: str, value: Any) -> None:
    with pytest.raises(PreflightError, match=re.escape(f"“{name}” must be {OPTIONS[name]}")):
        check_options({name: value})


def test_the_templates_are_those_of_chat_models_alone() -> None:
    assert len(TEMPLATES) == 63
    assert not {"embedding", "tts", "none", ""} & TEMPLATES


# Probe


class Info:
    """A server on a free port that answers /v1/info as the test says; anything else is 404."""

    def __init__(self, answer: Callable[[], tuple[int, bytes]]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = answer() if self.path == "/v1/info" else (404, b"")
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def probe(self, name: str = "smol") -> tuple[Health, str]:
        engine = WasmEdgeEngine(EngineSettings("wasmedge", Path("/x"), "", "llama-server"))
        with httpx.Client(timeout=0.3, trust_env=False) as client:
            found = engine.probe(Target("127.0.0.1", self.server.server_port, "sekret", name), client)
        assert found.slots_busy is None
        return found.health, found.detail

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def info() -> Iterator[Callable[[Callable[[], tuple[int, bytes]]], Info]]:
    servers: list[Info] = []

    def start(answer: Callable[[], tuple[int, bytes]]) -> Info:
        servers.append(Info(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.mark.parametrize(
    ("status", "body", "health"),
    [
        (200, b'{"chat_model": {"name": "smol"}}', Health.READY),
        (200, b'{"embedding_model": {"name": "smol"}}', Health.READY),
        (200, b'{"chat_model": {"name": "other"}, "tts_model": {"name": "smol"}}', Health.READY),
        (200, b'{"chat_model": {"name": "other"}}', Health.WRONG_SERVER),
        (200, b'{"chat_model": "smol"}', Health.WRONG_SERVER),
        (200, b"<html>", Health.WRONG_SERVER),
        (200, b"[]", Health.WRONG_SERVER),
        (404, b"", Health.WRONG_SERVER),
    ],
)
def test_ready_is_who_has_loaded_our_model(info: Callable[..., Info], status: int, body: bytes, health: Health) -> None:
    assert info(lambda: (status, body)).probe()[0] == health


def test_a_wrong_server_is_told_by_what_it_serves(info: Callable[..., Info]) -> None:
    assert info(lambda: (200, b'{"chat_model": {"name": "other"}}')).probe()[1] == "serves other, not smol"


def test_no_answer_in_time_is_busy_and_no_listener_is_a_load_or_an_end(info: Callable[..., Info]) -> None:
    release = threading.Event()

    def hang() -> tuple[int, bytes]:
        release.wait(10)
        return 200, b"{}"

    server = info(hang)
    assert server.probe()[0] == Health.BUSY
    release.set()
    server.server.shutdown()
    server.server.server_close()
    assert server.probe()[0] == Health.UNREACHABLE
