"""What an administrator reads of an engine that ended.

Messages of the embedded engine are produced here by running it on broken files and in too little memory. Those of WasmEdge,
of its plugin, of llama-api-server and of llama-server's command line are quoted from their sources and issue trackers.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import string
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from models_app import diagnosis, engine_access
from models_app.contracts.diagnoses import LASTING, Code
from models_app.contracts.traits import CHAT_ROLE
from models_app.diagnosis import Case, Exit
from models_app.diagnosis_rules import RULES, TITLES
from models_app.engines import gguf, programs
from models_app.engines.base import Launch, ModelSpec
from models_app.engines.embedded import SPEC
from models_app.exceptions import PreflightError
from models_app.shim import ExitRecord
from tests.conftest import ROOT, free_port

CASE = Case("embedded", 20_001, "/models/m.gguf")
PATIENCE_S = 60.0


def record(code: int | None, number: int | None, lines: list[str], **more: Any) -> ExitRecord:
    plain: ExitRecord = {
        "code": code, "signal": number, "asked": False, "killed_after_grace": False, "lines": lines,
        "peak_memory_bytes": 512 << 20, "oom_kills": 0, "ended_at": 0.0,
    }  # fmt: skip
    return {**plain, **more}  # type: ignore[typeddict-item]


def diagnosed(lines: list[str], code: int = 1, case: Case = CASE) -> Exit:
    return diagnosis.of_record(record(code, None, lines), case)


# What other engines say

WASMEDGE_STAMP = "[2024-07-23 06:53:41.919] [error] "
SAID = {
    "plugin": (["unknown option: nn-preload"], Code.MISSING_PLUGIN, "wasi_nn-ggml plugin"),
    "import": (
        [
            WASMEDGE_STAMP + "instantiation failed: unknown import, Code: 0x62",
            WASMEDGE_STAMP + '    When linking module: "wasi_ephemeral_nn" , function name: "load_by_name_with_config"',
            WASMEDGE_STAMP + "    At AST node: import description",
        ],
        Code.UNKNOWN_IMPORT,
        "(wasi_ephemeral_nn: load_by_name_with_config)",
    ),
    "import alone": (["instantiation failed: unknown import, Code: 0x62"], Code.UNKNOWN_IMPORT, "does not offer"),
    "wasm": (
        [WASMEDGE_STAMP + "loading failed: magic header not detected, Code: 0x23"],
        Code.BAD_WASM,
        "(magic header not detected)",
    ),
    "saved page": (
        [
            "gguf_init_from_file: invalid magic characters 'Entr'",
            WASMEDGE_STAMP
            + "[WASI-NN] llama.cpp: llama_model_load: error loading model: llama_model_loader: failed to load model from n.gguf",
            WASMEDGE_STAMP + "[WASI-NN] GGML backend: Error: unable to init model.",
        ],
        Code.NOT_A_MODEL,
        "n.gguf is not in GGUF format (it begins with “Entr”)",
    ),
    "truncated": (
        [
            WASMEDGE_STAMP + "[WASI-NN] llama.cpp: llama_model_load: error loading model: tensor 'blk.10.ffn_down.weight' data "
            "is not within the file bounds, model is corrupted or incomplete"
        ],
        Code.TRUNCATED_MODEL,
        "/models/m.gguf is cut short or damaged",
    ),
    "counts": (
        ['Error: ArgumentError("The number of model names and prompt templates must be the same.")'],
        Code.COUNTS_APART,
        "another number of prompt templates than of models",
    ),
    "template": (
        ["error: invalid value 'chatml2' for '--prompt-template <PROMPT_TEMPLATE>'"],
        Code.BAD_TEMPLATE,
        "“chatml2”",
    ),
    "clap": (["error: unexpected argument '--shiny' found"], Code.UNKNOWN_OPTION, "option --shiny."),
    "llama-server": (["error: invalid argument: --shiny"], Code.UNKNOWN_OPTION, "option --shiny."),
    "getopt": (["wrapper: unrecognized option '--shiny'"], Code.UNKNOWN_OPTION, "option --shiny."),
    "value": (
        ["error while handling argument \"--flash-attn\": unknown value '--temp'"],
        Code.BAD_OPTION,
        "--flash-attn: unknown value '--temp'.",
    ),
    "library": (
        [
            "llama-server: error while loading shared libraries: libcudart.so.12: cannot open shared object file: "
            "No such file or directory"
        ],
        Code.MISSING_LIBRARY,
        "library libcudart.so.12,",
    ),
    "glibc": (
        ["./llama-server: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.38' not found (required by ./llama-server)"],
        Code.MISSING_LIBRARY,
        "(GLIBC_2.38)",
    ),
    "package": (["ModuleNotFoundError: No module named 'xllamacpp'"], Code.MISSING_LIBRARY, "package xllamacpp"),
    "program": (
        ["cannot start /opt/llama-server: No such file or directory"],
        Code.MISSING_PROGRAM,
        "/opt/llama-server cannot be run (No such file or directory)",
    ),
    "cuda": (
        [
            "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 45108.64 MiB on device 0: cudaMalloc failed: out of memory",
            "llama_model_load: error loading model: unable to allocate CUDA0 buffer",
        ],
        Code.OUT_OF_MEMORY,
        "GPU's memory is too small for what was asked of it: it asked for 45,109 MiB at once",
    ),
    "weights": (
        [
            "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 437944320",
            "llama_model_load: error loading model: unable to allocate CPU buffer",
        ],
        Code.OUT_OF_MEMORY,
        "not enough memory: it asked for 418 MiB at once and it had used 512 MiB.",
    ),
    "rust port": (
        ['Error: Operation("error binding to 127.0.0.1:20001: Address already in use (os error 98)")'],
        Code.PORT_TAKEN,
        "Port 20001 was taken",
    ),
    "driver": (
        ["ggml_cuda_init: failed to initialize CUDA: CUDA driver version is insufficient for CUDA runtime version"],
        Code.NO_GPU,
        "(CUDA driver version is insufficient)",
    ),
    "missing tensor": (
        ["llama_model_load: error loading model: missing tensor 'blk.0.attn_q.weight'"],
        Code.UNSUPPORTED_MODEL,
        "missing tensor 'blk.0.attn_q.weight'",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_what_an_engine_said_is_recognised(name: str) -> None:
    lines, code, said = SAID[name]
    end = diagnosed(["loading", *lines, ""])
    assert end.diagnosis == code
    assert said in end.reason
    assert end.remedy
    assert end.reason.endswith(f" {end.remedy}")


def test_every_code_has_a_title_and_every_rule_can_fill_its_sentence() -> None:
    assert set(TITLES) == set(Code)
    given = {"port", "path", "amount"}
    for rule in RULES:
        names = {name for _, name, _, _ in string.Formatter().parse(rule.what) if name}
        assert names <= given | set(rule.pattern.groupindex), rule


def test_every_kind_is_explained_to_operators() -> None:
    manual = (ROOT / "docs" / "operations.md").read_text()
    assert [code for code in Code if f"`{code}`" not in manual] == []


@pytest.mark.parametrize(
    "line",
    [
        "ggml_cuda_host_malloc: failed to allocate 1900.00 MiB of pinned memory: invalid argument",
        "0.00.209.545 W ggml_aligned_malloc: insufficient memory (attempted to allocate 1440.00 MB)",
        "0.00.209.545 I srv  load: out of memory is what this line does not mean",
    ],
)
def test_what_an_engine_survived_is_not_taken_for_the_cause(line: str) -> None:
    assert diagnosed([line, "the end"]).diagnosis == Code.UNKNOWN


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["Traceback", "ValueError: no"], "exit code 1; it last said: “ValueError: no”."),
        (["", "  "], "exit code 1 without a word."),
        ([], "exit code 1 without a word."),
        (
            ["thread 'main' panicked at src/main.rs:215:9:", "index out of bounds", "note: run with `RUST_BACKTRACE=1`"],
            "“thread 'main' panicked at src/main.rs:215:9: index out of bounds”",
        ),
        (
            [WASMEDGE_STAMP + "execution failed: unreachable, Code: 0x40a", WASMEDGE_STAMP + "    At AST node: module"],
            "it last said: “execution failed: unreachable, Code: 0x40a”.",
        ),
        (["0.1 E srv init: exiting due to reasons", "0.2 I srv init: bye"], "“exiting due to reasons”"),
        (["model loaded", "0.02.739.706 W srv    operator(): unauthorized: Invalid API Key"], "it last said: “model loaded”."),
        (["x" * 500], "x" * 299 + "…”"),
    ],
)
def test_an_unknown_end_keeps_the_last_words(lines: list[str], said: str) -> None:
    end = diagnosed(lines)
    assert end.diagnosis == Code.UNKNOWN
    assert said in end.reason


# Signals


@pytest.mark.parametrize(
    ("number", "more", "code", "said"),
    [
        (9, {"oom_kills": 1}, Code.OUT_OF_MEMORY, "by the kernel for want of memory when it used 512 MiB"),
        (9, {}, Code.KILLED, "by somebody outside"),
        (11, {}, Code.CRASHED, "crashed (SIGSEGV). Lower ctx_size"),
        (4, {}, Code.CRASHED, "lacks an instruction"),
        (7, {}, Code.CRASHED, "Check the disk and the model file"),
        (15, {}, Code.KILLED, "ended by SIGTERM"),
        (200, {}, Code.KILLED, "signal 200"),
        (15, {"asked": True}, Code.STOPPED, "told from outside"),
    ],
)
def test_a_signal_is_named_and_what_it_means(number: int, more: dict[str, Any], code: Code, said: str) -> None:
    end = diagnosis.of_record(record(None, number, ["last words"], **more), CASE)
    assert (end.diagnosis, end.signal, end.log) == (code, number, "last words")
    assert said in end.reason


def test_an_abort_for_want_of_memory_is_want_of_memory() -> None:
    lines = ["terminate called after throwing an instance of 'std::bad_alloc'", "  what():  std::bad_alloc"]
    assert diagnosis.of_record(record(None, signal.SIGABRT, lines), CASE).diagnosis == Code.OUT_OF_MEMORY


def test_a_failed_check_of_the_engine_is_quoted() -> None:
    end = diagnosis.of_record(record(None, signal.SIGABRT, ["GGML_ASSERT: llama.cpp:621: data", "x"]), CASE)
    assert "SIGABRT); it last said: “GGML_ASSERT: llama.cpp:621: data”." in end.reason


def test_a_wasm_engine_s_segfault_points_to_its_memory() -> None:
    end = diagnosis.of_record(record(None, signal.SIGSEGV, []), Case("wasmedge"))
    assert "lower ctx_size" in end.remedy


def test_a_wrapper_script_hands_on_its_child_s_signal() -> None:
    end = diagnosed([], code=128 + signal.SIGSEGV)
    assert (end.diagnosis, end.code, end.signal) == (Code.CRASHED, 139, None)


# Ends without an exit of their own


def test_a_lost_shim_is_told_from_a_restarted_machine() -> None:
    lost = diagnosis.without_record(["last words"], CASE)
    assert (lost.diagnosis, lost.log) == (Code.KILLED, "last words")
    assert diagnosis.without_record([], Case(rebooted=True)).diagnosis == Code.NODE_RESTARTED


def test_a_late_engine_says_what_it_did_last() -> None:
    end = diagnosis.not_ready(["loading 12%"], None)
    assert (end.diagnosis, end.code, end.signal) == (Code.START_TIMEOUT, None, None)
    assert "its log last said: “loading 12%”." in end.reason
    assert diagnosis.not_ready([], record(None, 9, ["too late"])).log == "too late"


def test_other_ends_of_ours_have_a_code_and_a_remedy() -> None:
    ends = [diagnosis.wrong_server(20_001, "nginx (pid 7)", [], None), diagnosis.wedged("no answer", [], None)]
    ends.append(diagnosis.not_started("No process was started."))
    assert [end.diagnosis for end in ends] == [Code.WRONG_SERVER, Code.WEDGED, Code.NOT_STARTED]
    assert all(end.remedy and end.reason.endswith(end.remedy) for end in ends)


def test_a_code_from_elsewhere_still_has_a_title() -> None:
    assert diagnosis.title("out_of_memory") == "Out of memory"
    assert diagnosis.title("solar_flare") == "Solar flare"


# What a preflight finds before anything is started


def refuse_file(content: bytes) -> Callable[[Path], object]:
    def refuse(folder: Path) -> None:
        (folder / "m.gguf").write_bytes(content)
        gguf.check(folder / "m.gguf")

    return refuse


REFUSALS: dict[Code, Callable[[Path], object]] = {
    Code.NOT_A_MODEL: refuse_file(b"<html>Entry not found</html>"),
    Code.TRUNCATED_MODEL: refuse_file(b"GGUF\x03\x00\x00\x00"),
    Code.MISSING_PROGRAM: lambda folder: programs.find(str(folder / "llama-server"), "SETTING", "install it"),
    Code.PREFLIGHT: lambda _: engine_access.adapter("steam"),
}


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refusal_has_a_kind_as_an_exit_has(code: Code, tmp_path: Path) -> None:
    with pytest.raises(PreflightError) as refusal:
        REFUSALS[code](tmp_path)
    assert refusal.value.diagnosis == code
    assert code in LASTING  # it is tried again for ever, but no request waits for that


# The embedded engine itself


@dataclass
class Engine:
    """Runs the real server of the embedded engine in a folder and gives its exit record, as its shim would write it."""

    folder: Path
    model: Path

    def run(self, model: Path | None = None, port: int | None = None, memory: int | None = None, **spec: Any) -> ExitRecord:
        """The launch file is the adapter's for the sound model, changed afterwards: what a preflight would have refused."""
        sound = ModelSpec("m", CHAT_ROLE, self.model, None, None, "", 512, 64, 1, 1, 0)
        command = engine_access.adapter("embedded").command(Launch(sound, 1, 1, port or free_port(), "k", self.folder))
        said = {**json.loads(command.files[SPEC]), "model_path": str(model or self.model), **spec}
        (self.folder / SPEC).write_text(json.dumps(said))

        def limit() -> None:
            if memory is not None:
                resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

        both: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(command.argv, **both, preexec_fn=limit, timeout=PATIENCE_S, check=False)
        lines = done.stdout.decode(errors="replace").splitlines()
        code = done.returncode
        return record(code if code >= 0 else None, -code if code < 0 else None, lines)

    def broken(self, change: Callable[[bytes], bytes]) -> Path:
        """A copy of the model after a change."""
        file = self.folder / "broken.gguf"
        file.write_bytes(change(self.model.read_bytes()))
        return file


@pytest.fixture
def engine(tmp_path: Path, demo_model: Path) -> Iterator[Engine]:
    yield Engine(tmp_path, demo_model)
    (tmp_path / "broken.gguf").unlink(missing_ok=True)  # 98 MB


def other_architecture(model: bytes) -> bytes:
    return model.replace(b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00zzzzz", 1)


BROKEN: dict[str, tuple[Callable[[bytes], bytes], Code, str]] = {
    "a saved page": (lambda _: b"<html>Entry not found</html>" * 99, Code.NOT_A_MODEL, "it begins with “<htm”"),
    "half a file": (lambda model: model[:50_000_000], Code.TRUNCATED_MODEL, "broken.gguf is cut short or damaged"),
    "half a header": (lambda model: model[:100_000], Code.TRUNCATED_MODEL, "broken.gguf is cut short or damaged"),
    "ten bytes": (lambda model: model[:10], Code.TRUNCATED_MODEL, "broken.gguf is cut short or damaged"),
    "noise in the header": (lambda model: model[:200] + b"\xff" * 200 + model[400:], Code.TRUNCATED_MODEL, "damaged"),
    "an architecture to come": (other_architecture, Code.UNSUPPORTED_MODEL, "“zzzzz”"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_embedded_engine_s_own_words_on_a_broken_file_are_understood(engine: Engine, name: str) -> None:
    change, code, said = BROKEN[name]
    end = diagnosis.of_record(engine.run(engine.broken(change)), Case("embedded"))
    assert (end.diagnosis, end.code) == (code, 1), end.log
    assert said in end.reason


def test_a_model_file_that_has_gone_is_named(engine: Engine) -> None:
    end = diagnosis.of_record(engine.run(engine.folder / "gone.gguf"), Case("embedded"))
    assert end.diagnosis == Code.MISSING_FILE
    assert f"{engine.folder / 'gone.gguf'} cannot be opened (No such file or directory)" in end.reason


def test_a_context_that_does_not_fit_into_memory_is_told_with_its_size(engine: Engine) -> None:
    end = diagnosis.of_record(engine.run(memory=1200 << 20, n_ctx=65_536), Case("embedded"))
    assert end.diagnosis == Code.OUT_OF_MEMORY, end.log
    assert "not enough memory for the context: it asked for 1,440 MiB at once" in end.reason
    assert "Lower ctx_size" in end.remedy


def test_a_port_taken_after_the_preflight_is_named(engine: Engine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        end = diagnosis.of_record(engine.run(port=port), Case("embedded", port))
    assert end.diagnosis == Code.PORT_TAKEN, end.log
    assert f"Port {port} was taken" in end.reason
