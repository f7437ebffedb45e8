"""The engine llama-server without a model: which binaries it takes, and the command line each of them gets.

The binaries here are small shell scripts that answer --version and --help as real ones do; the real one is tested beside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models_app import engine_access
from models_app.engines.base import Launch, ModelSpec
from models_app.engines.embedded_options import OPTIONS as EMBEDDED
from models_app.engines.llama_server import NEEDED, LlamaServerEngine
from models_app.engines.llama_server_binary import flags_in, inspect
from models_app.engines.llama_server_options import OPTIONS, SAID, as_argv
from models_app.engines.options import check
from models_app.exceptions import MissingLibrary, MissingProgram, PreflightError
from tests.fakes import gguf_files
from tests.models.test_embedded import spec

HELP = """----- common params -----

-h,    --help, --usage                  print usage and exit
-t,    --threads N                      number of CPU threads to use during generation (default: -1)
                                        (env: LLAMA_ARG_THREADS)
-c,    --ctx-size N                     size of the prompt context
-b,    --batch-size N                   logical maximum batch size
-ub,   --ubatch-size N                  physical maximum batch size
-ngl,  --gpu-layers, --n-gpu-layers N   max. number of layers to store in VRAM
-m,    --model FNAME                    model path to load
                                        - none: no special loading mode; see also --not-a-flag
-np,   --parallel N                     number of server slots
-a,    --alias STRING                   set model name aliases
--pooling {none,mean,cls,last,rank}     pooling type for embeddings
--embedding, --embeddings               restrict to only support embedding use case
--host HOST                             ip address to listen
--port PORT                             port to listen
--api-key-file FNAME                    path to file containing API keys
--metrics                               enable prometheus compatible metrics endpoint
--slots, --no-slots                     expose slots monitoring endpoint
--jinja, --no-jinja                     whether to use jinja template engine for chat
--chat-template JINJA_TEMPLATE          set custom jinja chat template
--temp N                                temperature
"""
NEWER = (
    HELP + "-lm,   --load-mode MODE                 model loading mode\n-cram, --cache-ram N    cache\n--no-ui, --no-webui    x\n"
)


@pytest.fixture
def binary(tmp_path: Path) -> Callable[..., Path]:
    """Writes a script that answers as told: its version line, its help, or what it does instead of answering."""

    def write(version: str = "version: 4567 (abc1234)", text: str = HELP, instead: str = "") -> Path:
        path = tmp_path / "llama-server"
        answers = f"case $1 in --version) echo '{version}';; --help) cat <<'END'\n{text}END\n;; esac"
        path.write_text(f"#!/bin/sh\n{instead or answers}\n")
        path.chmod(0o755)
        return path

    return write


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    return gguf_files.llama(tmp_path / "m.gguf")


def engine(program: Path | str) -> LlamaServerEngine:
    return LlamaServerEngine(dataclasses.replace(engine_access.engine_settings(), llama_server=str(program)))


def argv_of(program: Path, model: ModelSpec) -> list[str]:
    return engine(program).command(Launch(model, 7, 2, 20_007, "sekret", Path("/run/7/2"))).argv


def test_every_spelling_of_every_flag_is_found_and_nothing_of_the_descriptions() -> None:
    flags = flags_in(HELP)
    assert {"-ngl", "--gpu-layers", "--n-gpu-layers", "--no-slots", "--embeddings", "--temp"} <= flags
    assert "--not-a-flag" not in flags
    assert not any(" " in flag for flag in flags)


@pytest.mark.parametrize(
    ("line", "build"),
    [
        ("version: 4567 (abc1234)", 4567),
        ("version: 0.1.0-dev (build 4567, commit abc1234)", 4567),
        ("version: 1 (571d0d5)", None),
        ("version: 0.1.0-dev (build 1, commit 7e4c0a9)", None),
        ("version: unknown", None),
    ],
)
def test_the_build_is_known_unless_it_was_built_from_a_shallow_clone(
    binary: Callable[..., Path], line: str, build: int | None
) -> None:
    assert inspect(str(binary(line))).build == build


def test_a_binary_is_asked_again_once_it_has_changed(binary: Callable[..., Path]) -> None:
    assert inspect(str(binary("version: 4567 (a)"))).build == 4567
    assert inspect(str(binary("version: 45678 (a)"))).build == 45678


@pytest.mark.parametrize(
    ("instead", "kind", "told"),
    [
        ("echo hello", MissingProgram, "is not llama.cpp's server"),
        (
            'echo "$0: error while loading shared libraries: libcudart.so.12: cannot open shared object file"; exit 127',
            MissingLibrary,
            "the library libcudart.so.12 is missing; install it, or add its folder to LD_LIBRARY_PATH",
        ),
        (
            "echo \"$0: /lib/libc.so.6: version 'GLIBC_2.38' not found (required by $0)\"; exit 1",
            MissingLibrary,
            "GLIBC_2.38 is missing here",
        ),
        ("kill -ILL $$", MissingProgram, "another kind of processor"),
        ("echo no driver; exit 3", MissingProgram, r"exit code 3\): no driver"),
    ],
)
def test_a_binary_that_does_not_start_is_told_from_why(
    binary: Callable[..., Path], model_file: Path, instead: str, kind: type[PreflightError], told: str
) -> None:
    with pytest.raises(kind, match=told):
        engine(binary(instead=instead)).preflight(spec(model_file))


def test_a_missing_binary_is_named_with_its_setting(model_file: Path) -> None:
    with pytest.raises(PreflightError, match=r"llama-nowhere is not on PATH; install llama.cpp .* in ASSISTANT_LLAMA_SERVER"):
        engine("llama-nowhere").preflight(spec(model_file))


def test_what_is_installed_is_told_with_its_version(binary: Callable[..., Path]) -> None:
    program = binary("version: 4567 (abc1234)")
    assert engine(program).installed() == f"{program}, version 4567 (abc1234)"
    with pytest.raises(MissingProgram):
        engine("llama-nowhere").installed()


def test_an_old_binary_is_refused_with_the_flags_it_lacks(binary: Callable[..., Path], model_file: Path) -> None:
    old = HELP.replace("--api-key-file FNAME", "--api-key KEY").replace("--metrics ", "--meters ")
    with pytest.raises(PreflightError, match="too old: it lacks --api-key-file, --metrics"):
        engine(binary(text=old)).preflight(spec(model_file))


def test_what_is_needed_is_what_the_command_line_says(binary: Callable[..., Path], model_file: Path) -> None:
    chat = argv_of(binary(), spec(model_file, threads=3, prompt_template="llama2"))
    embedding = argv_of(binary(), spec(None, part="embedding", embedding_model_path=model_file))
    assert set(NEEDED) <= {*chat, *embedding}
    assert {word for word in [*chat, *embedding] if word.startswith("--")} <= flags_in(HELP)


def test_a_chat_model_s_command_line(binary: Callable[..., Path], model_file: Path) -> None:
    program = binary(text=NEWER)
    command = engine(program).command(
        Launch(spec(model_file, threads=3, gpu_layers=-1), 7, 2, 20_007, "sekret", Path("/run/7/2"))
    )
    assert command.files == {"api-key": "sekret\n"}
    assert "sekret" not in " ".join(command.argv)
    assert " ".join(command.argv[1:]) == (
        f"--host 127.0.0.1 --port 20007 --model {model_file} --alias smol --api-key-file /run/7/2/api-key "
        "--ctx-size 3072 --parallel 3 --batch-size 256 --threads 3 --n-gpu-layers 999 --jinja --metrics --slots --no-ui "
        "--cache-ram 256"
    )


def test_an_embedding_model_s_command_line_has_a_batch_as_long_as_its_context(
    binary: Callable[..., Path], model_file: Path
) -> None:
    wanted = spec(None, part="embedding", embedding_model_path=model_file, ctx_size=100_000, extra_args={"sampling.temp": 1})
    line = " ".join(argv_of(binary(), wanted))
    assert "--ctx-size 12288 --parallel 3 --batch-size 4096 --ubatch-size 4096" in line  # trained for 4096
    assert "--embedding --pooling mean" in line
    assert "--temp" not in line


def test_the_renderer_of_templates_that_knows_the_name_is_chosen_before_the_name(
    binary: Callable[..., Path], model_file: Path
) -> None:
    assert "--no-jinja --chat-template llama2" in " ".join(argv_of(binary(), spec(model_file, prompt_template="llama2")))
    assert "--jinja --chat-template chatml" in " ".join(argv_of(binary(), spec(model_file, prompt_template="chatml")))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"cpus": "0-2,8"}, "--cpu-mask 107"),
        ({"tensor_split": [3, 1.5]}, "--tensor-split 3,1.5"),
        ({"devices": "CUDA0,CUDA1"}, "--device CUDA0,CUDA1"),
        ({"split_mode": "row", "main_gpu": 1}, "--split-mode row --main-gpu 1"),
        ({"flash_attn_type": "enabled"}, "--flash-attn on"),
        ({"flash_attn_type": "auto"}, "--flash-attn auto"),
        ({"numa": "disabled"}, ""),
        ({"cache_prompt": False, "warmup": True, "swa_full": False}, "--no-cache-prompt --warmup"),
        ({"priority": "low", "strict_cpu": True}, "--prio -1 --cpu-strict 1"),
        ({"load_mode": "mmap_mlock"}, "--load-mode mmap+mlock"),
        ({"lora": [{"path": "/a"}, {"path": "/b", "scale": 1}]}, "--lora /a,/b"),
        ({"lora": [{"path": "/a", "scale": 0.5}, {"path": "/b"}]}, "--lora-scaled /a:0.5,/b:1"),
        ({"draft_model": "/d"}, "--spec-draft-model /d --spec-type draft-simple"),
        ({"draft_model": "/d", "speculative": ["ngram_mod"]}, "--spec-draft-model /d --spec-type ngram-mod"),
        ({"chat_template_kwargs": {"a": False}}, '--chat-template-kwargs {"a": false}'),
        ({"sampling.samplers": ["top_k", "xtc"], "sampling.temp": 0.5}, "--samplers top_k;xtc --temp 0.5"),
    ],
)
def test_each_kind_of_setting_is_said_in_flags(values: dict[str, Any], said: str) -> None:
    class Everything:
        def spelling(self, *names: str) -> str | None:
            return names[0]

    check(OPTIONS, values)
    assert " ".join(as_argv(values, Everything())) == said


def test_older_spellings_are_used_where_the_newer_are_not_known() -> None:
    class Older:
        def spelling(self, *names: str) -> str | None:
            return next((name for name in names if name in {"--model-draft", "--draft-max", "--no-mmap", "--mlock"}), None)

    assert as_argv({"draft_model": "/d", "draft_n_max": 4, "load_mode": "mlock"}, Older()) == [
        *("--model-draft", "/d", "--draft-max", "4", "--no-mmap", "--mlock")
    ]


def test_a_setting_that_the_binary_has_no_flag_for_is_refused(binary: Callable[..., Path], model_file: Path) -> None:
    with pytest.raises(
        PreflightError, match="“reasoning_budget” needs --reasoning-budget, which this llama-server does not know"
    ):
        engine(binary()).preflight(spec(model_file, extra_args={"reasoning_budget": 0}))


def test_a_path_that_the_flag_would_take_for_two_is_refused() -> None:
    class Everything:
        def spelling(self, *names: str) -> str | None:
            return names[0]

    with pytest.raises(PreflightError, match="no path with a comma or colon"):
        as_argv({"lora": [{"path": "/a,b"}]}, Everything())


@pytest.mark.parametrize(
    "name", ["host", "port", "api_key", "api_key_file", "log_file", "slot_save_path", "rpc", "tools", "hf_repo"]
)
def test_addresses_keys_files_and_tools_can_never_be_set(name: str) -> None:
    with pytest.raises(PreflightError, match="not an allowed setting"):
        check(OPTIONS, {name: "x"})


def test_settings_of_both_engines_bear_the_same_names() -> None:
    assert {name for name in SAID if name not in EMBEDDED} == {"cpu_moe", "devices", "n_cpu_moe", "override_tensor"}
