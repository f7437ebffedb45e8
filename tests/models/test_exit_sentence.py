"""What an administrator reads of an engine that ended."""

from __future__ import annotations

import pytest

from models_app import exit_sentence
from models_app.shim import ExitRecord

TRUNCATED = [
    "0.00.080.000 I llama_model_loader: loaded meta data",
    "0.00.088.897 E common_fit_params: encountered an error while trying to fit params to free device memory",
    "0.00.188.125 E llama_model_load: error loading model: tensor 'token_embd.weight' data is not within the file bounds",
    "0.00.188.192 E srv    load_model: failed to load model, 'm.gguf'",
    "0.00.188.580 E srv          init: exiting due to model loading error",
]


def record(code: int | None, signal: int | None, lines: list[str], oom_kills: int = 0) -> ExitRecord:
    return {"code": code, "signal": signal, "lines": lines, "peak_memory_bytes": 1, "oom_kills": oom_kills}  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (TRUNCATED, ": error loading model: tensor 'token_embd.weight' data is not within the file bounds"),
        (TRUNCATED[-2:], ": failed to load model, 'm.gguf'"),
        (["Traceback", "ImportError: no module"], ": ImportError: no module"),
        (["", "  "], " without a word."),
        ([], " without a word."),
    ],
)
def test_an_exit_code_is_explained_by_what_the_engine_said_of_it(lines: list[str], said: str) -> None:
    assert exit_sentence.from_record(record(1, None, lines)).reason == f"The engine ended with exit code 1{said}"


@pytest.mark.parametrize(
    ("number", "oom_kills", "said"),
    [
        (9, 1, "for want of memory"),
        (9, 0, "by somebody outside"),
        (11, 0, "crashed (SIGSEGV)"),
        (15, 0, "ended by SIGTERM"),
        (200, 0, "signal 200"),
    ],
)
def test_a_signal_is_named_and_what_it_means(number: int, oom_kills: int, said: str) -> None:
    end = exit_sentence.from_record(record(None, number, ["last words"], oom_kills))
    assert said in end.reason
    assert end.log == "last words"
    assert end.signal == number
