"""A stand-in for the program `wasmedge` running llama-api-server 0.28. No model is loaded and nothing is inferred.

Neither WasmEdge with its wasi_nn-ggml plugin nor the wasm file comes from a package registry, so tests drive the adapter with
this program. It imitates, by what was read in the sources of both and in their users' reports:

* the command lines, strictly: WasmEdge's own options, then clap's rules for the guest's (an unknown flag, a missing value, a
  value that begins with a dash, a wrong number or template end it with clap's message and code 2), one value per model in
  every list, a config file with all four tables and every key, each alias preloaded;
* its failures, in their words: plugin missing, plugin's library missing, unknown import, not a wasm file, not a GGUF file,
  address in use, panics;
* its life: the load comes before the socket is bound, one thread serves everything (here a stream blocks other requests too,
  where the real one lets them in and mixes them up), TERM simply ends it;
* its dialect: max_tokens ignored, `stop` must be a list, plain-text errors that echo the request, streams without a final
  chunk and with the role on every delta, a marker where the context is full, speech padded with zeros, a panic on streamed
  /v1/responses and on /v1/files without a boundary.

`install()` puts an executable `wasmedge` and a wasm file into a folder; behaviour.json beside them is read at every run.
Standard library only; run as: wasmedge.py <behaviour.json> <wasmedge's arguments>.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import sys
import time
import tomllib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NoReturn, TypedDict, cast

SERVER_VERSION = "0.28.0"
CONTEXT_FULL = "<|WASMEDGE-GGML-CONTEXT-FULL|>"
WASM = b"\0asm\1\0\0\0" + b"stand-in for llama-api-server.wasm"
STAMP = "[2026-01-02 03:04:05.678] [error] "
# Some of those it knows.
TEMPLATES = {"chatml", "llama-3-chat", "gemma-3", "phi-4-chat", "embedding", "tts", "none"}


class Behaviour(TypedDict, total=False):
    """behaviour.json."""

    version: str  # of WasmEdge
    server_version: str  # of the wasm file
    plugin: str  # "ok", "missing", "library" (one that it needs is missing)
    imports: str  # "ok", "unknown"
    at_launch: bool  # plugin and imports are as said for a launch alone: they broke after they had been asked about
    unknown_flags: list[str]  # flags this version of the guest does not know
    load_s: float
    load_gate: str  # a file whose appearance lets the load go on; model files are read after that
    crash: int  # the signal the load ends with
    words: list[str]  # what it answers
    word_s: float  # before each word
    context_full: bool  # the answer ends for want of context
    name: str  # it claims to have loaded this one


@dataclass(frozen=True)
class Installation:
    """A stand-in WasmEdge in a folder of its own."""

    program: Path
    wasm: Path
    sha256: str
    behaviour_file: Path

    def behave(self, behaviour: Behaviour) -> None:
        """From the next run on."""
        self.behaviour_file.write_text(json.dumps(behaviour))


def install(folder: Path) -> Installation:
    """An executable named wasmedge and a wasm file, well-behaved until told otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    program, wasm, behaviour = folder / "wasmedge", folder / "llama-api-server.wasm", folder / "behaviour.json"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "{__file__}" "{behaviour}" "$@"\n')
    program.chmod(0o755)
    wasm.write_bytes(WASM)
    installation = Installation(program, wasm, hashlib.sha256(WASM).hexdigest(), behaviour)
    installation.behave({})
    return installation


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def end(code: int, *lines: str) -> NoReturn:
    say("\n".join(lines))
    sys.stdout.flush()
    os._exit(code)


def trap(where: str, what: str) -> NoReturn:
    """A panic of the guest, and what the runtime makes of it."""
    end(
        1,
        f"thread 'main' panicked at {where}:",
        what,
        "note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace",
        f"{STAMP}execution failed: unreachable, Code: 0x407",
        f"{STAMP}    In instruction: unreachable (0x00) , Bytecode offset: 0x006f2a4b",
        f'{STAMP}    When executing function name: "_start"',
    )


def clap(message: str) -> NoReturn:
    end(2, f"error: {message}", "", "For more information, try '--help'.")


# The runtime


@dataclass
class Host:
    """WasmEdge's own options."""

    mapped: dict[str, Path] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    preloaded: dict[str, Path] = field(default_factory=dict)


def plugin_lines(behaviour: Behaviour) -> list[str]:
    if behaviour.get("plugin") != "library":
        return []
    return [
        f"{STAMP}loading failed: invalid path, Code: 0x20",
        f"{STAMP}    load library failed:libopenblas.so.0: cannot open shared object file: No such file or directory",
    ]


def version(behaviour: Behaviour) -> list[str]:
    lines = [f"wasmedge version {behaviour.get('version', '0.14.1')}", ' (plugin "wasi_logging") version 0.1.0.0']
    if behaviour.get("plugin", "ok") == "ok":
        lines.append('/opt/wasmedge/lib/../plugin/libwasmedgePluginWasiNN.so (plugin "wasi_nn") version 0.1.28.0')
    return lines


def runtime_options(arguments: list[str], behaviour: Behaviour) -> tuple[Host, str, list[str]]:
    """The host's options, the wasm file, and what the guest gets."""
    host, rest = Host(), list(arguments)
    while rest and rest[0].startswith("--"):
        option = rest.pop(0)[2:]
        known = option in {"dir", "env"} or (option == "nn-preload" and behaviour.get("plugin", "ok") == "ok")
        if not known:
            end(1, f"unknown option: {option}")
        if not rest:
            end(1, f"option {option} expects a value")
        take_option(host, option, rest.pop(0))
    if not rest:
        end(1, "wasm_or_so is required")
    return host, rest[0], rest[1:]


def take_option(host: Host, option: str, value: str) -> None:
    parts = value.split(":")
    if option == "env":
        name, equals, text = value.partition("=")
        if not equals:
            end(1, f"bad --env {value}")
        host.env[name] = text
    elif option == "dir" and len(parts) == 2:
        host.mapped[parts[0]] = Path(parts[1])
    elif option == "nn-preload" and len(parts) == 4 and parts[1:3] == ["GGML", "AUTO"]:
        host.preloaded[parts[0]] = Path(parts[3])
    else:
        end(1, f"bad --{option} {value}")


def link(wasm: Path, behaviour: Behaviour) -> None:
    """Load and link the wasm file, as far as its magic and the wanted failure go."""
    if not wasm.is_file():
        end(1, f"{STAMP}loading failed: invalid path, Code: 0x20", f'{STAMP}    File name: "{wasm}"')
    if not wasm.read_bytes().startswith(b"\0asm"):
        end(1, f"{STAMP}loading failed: magic header not detected, Code: 0x23", f"{STAMP}    Bytecode offset: 0x00000000")
    if behaviour.get("plugin", "ok") != "ok" or behaviour.get("imports") == "unknown":
        end(
            1,
            f"{STAMP}instantiation failed: unknown import, Code: 0x62",
            f'{STAMP}    When linking module: "wasi_ephemeral_nn" , function name: "unload"',
            f"{STAMP}    At AST node: import description",
        )


# The guest's command line


@dataclass(frozen=True)
class Flag:
    convert: Callable[[str], object]
    listed: bool = False
    takes_value: bool = True


def unsigned(text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise ValueError("invalid digit found in string")
    return int(text)


def signed(text: str) -> int:
    if not re.fullmatch(r"[+-]?\d+", text):
        raise ValueError("invalid digit found in string")
    return int(text)


def real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("invalid float literal") from None


def template(text: str) -> str:
    if text not in TEMPLATES:
        raise ValueError(f"[possible values: {', '.join(sorted(TEMPLATES))}]")
    return text


def truth(text: str) -> bool:
    if text not in {"true", "false"}:
        raise ValueError("[possible values: true, false]")
    return text == "true"


def address(text: str) -> tuple[str, int]:
    if not re.fullmatch(r"[\d.]+:\d+", text):
        raise ValueError("invalid socket address syntax")
    host, _, port = text.rpartition(":")
    return host, int(port)


FLAGS: dict[str, Flag] = {
    "--model-name": Flag(str, listed=True), "--model-alias": Flag(str, listed=True), "--ctx-size": Flag(unsigned, listed=True),
    "--batch-size": Flag(unsigned, listed=True), "--ubatch-size": Flag(unsigned, listed=True),
    "--prompt-template": Flag(template, listed=True), "--reverse-prompt": Flag(str), "--n-predict": Flag(signed),
    "--n-gpu-layers": Flag(unsigned), "--split-mode": Flag(str), "--main-gpu": Flag(unsigned), "--tensor-split": Flag(str),
    "--threads": Flag(unsigned), "--no-mmap": Flag(truth), "--temp": Flag(real), "--top-p": Flag(real),
    "--repeat-penalty": Flag(real), "--presence-penalty": Flag(real), "--frequency-penalty": Flag(real), "--grammar": Flag(str),
    "--json-schema": Flag(str), "--llava-mmproj": Flag(str), "--include-usage": Flag(truth, takes_value=False),
    "--socket-addr": Flag(address), "--port": Flag(unsigned),
}  # fmt: skip
CONFIG_FLAGS: dict[str, Flag] = {
    "--file": Flag(str), "--chat": Flag(truth, takes_value=False), "--embedding": Flag(truth, takes_value=False),
    "--tts": Flag(truth, takes_value=False),
}  # fmt: skip


def parse(words: list[str], flags: dict[str, Flag], unknown: Collection[str] = ()) -> dict[str, Any]:
    """clap's rules for long flags."""
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        flag = flags.get(name)
        if flag is None or name in unknown:
            clap(f"unexpected argument '{name}' found")
        if name in found:
            clap(f"the argument '{name}' cannot be used multiple times")
        if not flag.takes_value:
            found[name] = True
            continue
        if not equals:
            if not rest:
                clap(f"a value is required for '{name} <VALUE>' but none was supplied")
            value = rest.pop(0)
            if value.startswith("-"):
                clap(f"unexpected argument '{value}' found")
        found[name] = convert(name, flag, value)
    return found


def convert(name: str, flag: Flag, value: str) -> object:
    parts = value.split(",") if flag.listed else [value]
    try:
        values = [flag.convert(part) for part in parts]
    except ValueError as error:
        clap(f"invalid value '{value}' for '{name} <VALUE>': {error}")
    return values if flag.listed else values[0]


@dataclass
class Loaded:
    """One model as /v1/info tells of it."""

    kind: str
    name: str
    alias: str
    ctx_size: int
    batch_size: int
    ubatch_size: int


def from_flags(words: list[str], behaviour: Behaviour) -> tuple[list[Loaded], tuple[str, int]]:
    found = parse(words, FLAGS, behaviour.get("unknown_flags", ()))
    if "--socket-addr" in found and "--port" in found:
        clap("the argument '--socket-addr <SOCKET_ADDR>' cannot be used with '--port <PORT>'")
    names, templates = found.get("--model-name", ["default"]), found.get("--prompt-template", [])
    if len(names) != len(templates):
        end(1, 'Error: ArgumentError("The number of model names and prompt templates must be the same.")')
    for flag in ("--model-alias", "--ctx-size", "--batch-size", "--ubatch-size"):
        if len(found.get(flag, [0, 0])) != len(names):
            trap("llama-api-server/src/main.rs:712:41", f"index out of bounds: {flag} has not one value for each model")
    rows = zip(names, found["--model-alias"], found["--ctx-size"], found["--batch-size"], found["--ubatch-size"], strict=True)
    kinds = ["embedding" if one == "embedding" else "chat" for one in templates]
    models = [Loaded(kind, *row) for kind, row in zip(kinds, rows, strict=True)]
    return models, found.get("--socket-addr", ("0.0.0.0", found.get("--port", 8080)))


SIZES = ("model_name", "model_alias", "ctx_size", "batch_size", "ubatch_size")
CHAT_KEYS = (
    *SIZES, "prompt_template", "n_predict", "n_gpu_layers", "split_mode", "threads", "no_mmap", "temp", "top_p", "repeat_penalty",
    "presence_penalty", "frequency_penalty", "include_usage",
)  # fmt: skip
KEYS = {
    "server": ("socket_addr",),
    "chat": CHAT_KEYS,
    "embedding": (*SIZES, "split_mode", "threads"),
    "tts": (*SIZES, "codec_model", "speaker_file", "n_predict", "n_gpu_layers", "temp"),
}


def from_config(words: list[str], host: Host) -> tuple[list[Loaded], tuple[str, int]]:
    found = parse(words, CONFIG_FLAGS)
    kinds = [kind for kind in ("chat", "embedding", "tts") if found.get(f"--{kind}")]
    if not kinds:
        end(1, 'Error: Operation("Specify at least one of the following: chat, embedding, and/or TTS.")')
    folder = host.mapped.get(".")
    file = folder / found["--file"] if folder else Path("/nowhere")
    if not file.is_file():
        end(1, 'Error: Operation("No such file or directory (os error 44)")')
    config = tomllib.loads(file.read_text())
    for table, keys in KEYS.items():
        for key in keys:
            if key not in config.get(table, {}):
                end(1, f'Error: Operation("TOML parse error: missing field `{key}` in [{table}]")')
    if config["chat"]["prompt_template"] not in TEMPLATES:
        end(1, 'Error: Operation("Failed to parse prompt_template from config file: Unknown prompt template type")')
    if "tts" in kinds and not Path(config["tts"]["codec_model"]).is_file():
        end(1, "[WASI-NN] GGML backend: Error: unable to load the vocoder model.", 'Error: Operation("Failed to load tts")')
    return [Loaded(kind, *(config[kind][key] for key in SIZES)) for kind in kinds], address(config["server"]["socket_addr"])


# The load


def load(models: list[Loaded], host: Host, behaviour: Behaviour) -> None:
    say(f"[INFO] {len(models)} models to load")
    time.sleep(behaviour.get("load_s", 0.0))
    while (gate := behaviour.get("load_gate")) and not Path(gate).exists():
        time.sleep(0.02)
    if "crash" in behaviour:
        os.kill(os.getpid(), behaviour["crash"])
    for model in models:
        path = host.preloaded.get(model.alias)
        if path is None:
            end(1, f'Error: Operation("Failed to load the model {model.alias}: not found in the preloaded graphs")')
        refuse_no_model(path)
        say(f"llama_model_loader: loaded meta data of {path} (stand-in: nothing is loaded)")


def refuse_no_model(path: Path) -> None:
    """What llama.cpp says of a file it cannot load."""
    last = [
        f"llama_model_load_from_file_impl: failed to load model '{path}'",
        f"{STAMP}[WASI-NN] GGML backend: Error: unable to init model.",
    ]
    try:
        start = path.read_bytes()[:32]
    except OSError as error:
        end(1, f"gguf_init_from_file: failed to open GGUF file '{path}' ({error.strerror})", *last)
    if not start.startswith(b"GGUF"):
        end(1, f"gguf_init_from_file_impl: invalid magic characters: '{start[:4].decode('latin-1')}', expected 'GGUF'", *last)
    if len(start) < 24:
        end(1, "gguf_init_from_file_impl: failed to read header", *last)


# The server


class Guest(HTTPServer):
    """Serial, as one thread that serves HTTP and computes."""

    request_queue_size = 64

    def __init__(self, where: tuple[str, int], models: list[Loaded], behaviour: Behaviour) -> None:
        self.models = {model.kind: model for model in models}
        self.behaviour = behaviour
        super().__init__(where, Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        say(f"[WARN] connection ended: {sys.exc_info()[1]!r}")


class Refused(Exception):
    """str() is a plain-text answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Guest

    def do_GET(self) -> None:
        if self.path == "/v1/info":
            self.send_json(self.info())
        elif self.path == "/v1/models":
            self.send_json({"object": "list", "data": [{"id": model.name} for model in self.server.models.values()]})
        else:
            self.send_text(404, f"404 The requested service endpoint is not found: {self.path}")

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode()
        answers = {
            "/v1/chat/completions": self.chat, "/v1/completions": self.completion, "/v1/embeddings": self.embeddings,
            "/v1/audio/speech": self.speech, "/v1/responses": self.response_object, "/v1/files": self.files,
        }  # fmt: skip
        answer = answers.get(self.path)
        try:
            if answer is None:
                raise Refused(404, f"404 The requested service endpoint is not found: {self.path}")
            answer(raw)
        except Refused as refused:
            self.send_text(refused.status, str(refused))

    def info(self) -> dict[str, Any]:
        said: dict[str, Any] = {
            "api_server": {"type": "llama", "version": SERVER_VERSION, "port": str(self.server.server_port)},
            "extras": {},
        }
        for kind, model in self.server.models.items():
            name = self.server.behaviour.get("name", model.name)
            said[f"{kind}_model"] = {"name": name, "type": kind, "ctx_size": model.ctx_size, "batch_size": model.batch_size}
        return said

    def parsed(self, raw: str, what: str) -> dict[str, Any]:
        try:
            request = json.loads(raw)
        except ValueError as error:
            raise Refused(400, f"400 Bad Request: Failed to deserialize {what} request: {error}, {raw}") from None
        if isinstance(request.get("stop"), str):
            problem = f'invalid type: string "{request["stop"]}", expected a sequence'
            raise Refused(400, f"400 Bad Request: Failed to deserialize {what} request: {problem}, {raw}")
        return cast(dict[str, Any], request)

    def loaded(self, kind: str) -> Loaded:
        """Whatever model was asked for: it answers with the one it has."""
        if kind not in self.server.models:
            raise Refused(500, f"500 Internal Server Error: There is no available {kind} model")
        return self.server.models[kind]

    def words(self) -> Iterator[str]:
        for word in self.server.behaviour.get("words", ["Hello", " from", " the", " stand-in", "."]):
            time.sleep(self.server.behaviour.get("word_s", 0.0))
            yield word
        if self.server.behaviour.get("context_full"):
            yield CONTEXT_FULL

    def chat(self, raw: str) -> None:
        request = self.parsed(raw, "chat completion")
        model = self.loaded("chat")
        if request.get("stream"):
            self.stream(model)
            return
        text = "".join(self.words())
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        self.send_json(
            {"id": "chatcmpl-1", "object": "chat.completion", "model": model.name, "choices": [choice], "usage": usage(text)}
        )

    def stream(self, model: Loaded) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for word in ["", *self.words()]:  # an empty one: a character of several bytes that is not there yet
            delta = {"index": 0, "delta": {"role": "assistant", "content": word}, "finish_reason": None}
            self.send_chunk({"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": model.name, "choices": [delta]})
        self.write_chunk(b"data: [DONE]\n\n")
        self.write_chunk(b"")

    def send_chunk(self, event: dict[str, Any]) -> None:
        self.write_chunk(f"data: {json.dumps(event)}\n\n".encode())

    def write_chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def completion(self, raw: str) -> None:
        self.parsed(raw, "completion")
        model, text = self.loaded("chat"), "".join(self.words())
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        self.send_json(
            {"id": "cmpl-1", "object": "text_completion", "model": model.name, "choices": [choice], "usage": usage(text)}
        )

    def embeddings(self, raw: str) -> None:
        given = self.parsed(raw, "embeddings").get("input", [])
        model = self.loaded("embedding")
        texts = [given] if isinstance(given, str) else given
        data = [{"index": at, "object": "embedding", "embedding": vector(text)} for at, text in enumerate(texts)]
        self.send_json({"object": "list", "data": data, "model": model.name, "usage": usage(" ".join(texts))})

    def speech(self, raw: str) -> None:
        request = self.parsed(raw, "speech")
        self.loaded("tts")
        sound = str(request.get("input", "")).encode()
        body = (
            b"WAVEfmt "
            + struct.pack("<IHHIIHH", 16, 1, 1, 24_000, 48_000, 2, 16)
            + b"data"
            + struct.pack("<I", len(sound))
            + sound
        )
        self.send_bytes(200, "audio/wav", b"RIFF" + struct.pack("<I", len(body)) + body + bytes(4096))

    def response_object(self, raw: str) -> None:
        request = self.parsed(raw, "responses")
        if request.get("stream") or request.get("tools"):
            trap("llama-api-server/src/backend/ggml.rs:1480:13", "not yet implemented")
        self.send_json({"id": "resp_1", "object": "response", "output": "".join(self.words())})

    def files(self, raw: str) -> None:
        if "boundary=" not in self.headers.get("Content-Type", ""):
            trap("llama-api-server/src/backend/ggml.rs:604:58", "called `Option::unwrap()` on a `None` value")
        self.send_json({"id": "file_1", "object": "file", "bytes": len(raw)})

    def send_json(self, value: object) -> None:
        self.send_bytes(200, "application/json", json.dumps(value).encode())

    def send_text(self, status: int, text: str) -> None:
        self.send_bytes(status, "text/plain", text.encode())

    def send_bytes(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """At level warn it logs no requests."""


def usage(text: str) -> dict[str, int]:
    return {"prompt_tokens": 7, "completion_tokens": len(text.split()), "total_tokens": 7 + len(text.split())}


def vector(text: str) -> list[float]:
    return [byte / 255 for byte in hashlib.sha256(text.encode()).digest()[:8]]


def main(behaviour_file: str, arguments: list[str]) -> None:
    behaviour: Behaviour = json.loads(Path(behaviour_file).read_text())
    if behaviour.get("at_launch") and arguments[-1:] in (["-v"], ["--version"], ["-V"]):
        behaviour = {}
    for line in plugin_lines(behaviour):
        say(line)
    if arguments in (["-v"], ["--version"]):
        end(0, *version(behaviour))
    host, wasm, words = runtime_options(arguments, behaviour)
    link(Path(wasm), behaviour)
    if words == ["-V"]:
        end(0, f"LlamaEdge API Server {behaviour.get('server_version', SERVER_VERSION)}")
    models, where = from_config(words[1:], host) if words[:1] == ["config"] else from_flags(words, behaviour)
    if host.env.get("LLAMA_LOG", "info") == "info":
        say("[INFO] API Key: would be logged, and every prompt")
    load(models, host, behaviour)
    try:
        server = Guest(where, models, behaviour)
    except OSError as error:
        problem = f'Os {{ code: {error.errno}, kind: AddrInUse, message: "Address already in use" }}'
        trap("llama-api-server/src/main.rs:951:58", f"called `Result::unwrap()` on an `Err` value: {problem}")
    server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
