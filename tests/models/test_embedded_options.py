"""What extra_args may say to llama.cpp: every setting is one the library takes, and files stay in the model folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import xllamacpp
from django.conf import settings
from pytest_django.fixtures import Settings

from models_app import launch_spec
from models_app.engines import llama_server_options
from models_app.engines.embedded_options import OPTIONS, as_attributes, check_options
from models_app.engines.embedded_server import set_option
from models_app.engines.options import Adapters, Cpus, File, Number, Option, Shares, Switch, Table, Text, Whole, Word, Words
from models_app.exceptions import PathNotAllowed
from tests.models.instances import make_model


def examples(option: Option) -> list[Any]:
    """Values at the edges of what this option takes."""
    found: dict[type, Any] = {
        Adapters: lambda _: [[{"path": "/a.gguf"}, {"path": "/b.gguf", "scale": 0.5}]],
        Cpus: lambda _: ["0", "0-2,511"],
        File: lambda _: ["/m.gguf"],
        Shares: lambda each: [[1], [0.25] * each.most],
        Switch: lambda _: [True, False],
        Table: lambda _: [{"enable_thinking": False, "level": "high", "n": 3}],
        Text: lambda _: ['root ::= "yes"'],
        Words: lambda each: [list(each.words[:1]), list(reversed(each.words))],
    }
    if isinstance(option, Whole | Number):
        return [option.low, option.high]
    return list(option.words) if isinstance(option, Word) else list(found[type(option)](option))


def parameters(values: dict[str, Any]) -> Any:
    params = xllamacpp.CommonParams()
    for name, value in as_attributes(values).items():
        set_option(params, name, value)
    return params


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"pooling_type"}))  # which the model's part decides
def test_the_library_takes_every_setting(name: str) -> None:
    for value in examples(OPTIONS[name]):
        check_options({name: value})
        attributes = as_attributes({name: value})
        assert attributes
        parameters({name: value})


def test_what_is_set_is_what_the_library_has() -> None:
    params = parameters({
        "cpus": "1,3-4", "priority": "high", "reasoning": "off", "reasoning_budget": 0, "draft_model": "/d.gguf",
        "draft_n_max": 5, "mmproj": "/p.gguf", "tensor_split": [3, 1], "sampling.samplers": ["top_k", "temperature"],
        "lora": [{"path": "/l.gguf", "scale": 0.25}], "chat_template_kwargs": {"enable_thinking": False},
        "rope_scaling_type": "yarn", "sampling.grammar": 'root ::= "a"',
    })  # fmt: skip
    for threads in (params.cpuparams, params.cpuparams_batch):
        assert [number for number, used in enumerate(threads.cpumask) if used] == [1, 3, 4]
        assert threads.mask_valid
        assert threads.priority == xllamacpp.ggml_sched_priority.GGML_SCHED_PRIO_HIGH
    assert (params.enable_reasoning, params.sampling.reasoning_budget_tokens) == (0, 0)
    assert (params.speculative.draft.mparams.path, params.speculative.draft.n_max) == ("/d.gguf", 5)
    assert params.speculative.types == [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    assert params.mmproj.path == "/p.gguf"
    assert params.tensor_split[:3] == [3.0, 1.0, 0.0]
    assert params.sampling.samplers == "top_k;temperature"
    assert [(one.path, one.scale) for one in params.lora_adapters] == [("/l.gguf", 0.25)]
    assert params.default_template_kwargs == {"enable_thinking": "false"}
    assert params.rope_scaling_type == xllamacpp.llama_rope_scaling_type.LLAMA_ROPE_SCALING_TYPE_YARN
    assert params.sampling.grammar.grammar == 'root ::= "a"'


@pytest.fixture
def folder(settings: Settings, tmp_path: Path) -> Path:
    models = tmp_path / "models"
    models.mkdir()
    settings.ASSISTANT_MODEL_DIRS = [models]
    for name in ("smol.gguf", "draft.gguf", "adapter.gguf"):
        (models / name).touch()
    (tmp_path / "outside.gguf").touch()
    (models / "link.gguf").symlink_to(tmp_path / "outside.gguf")
    return models


@pytest.mark.django_db
@pytest.mark.parametrize("engine", ["embedded", "llama-server"])
class TestFiles:
    def test_files_in_extra_args_are_found_in_the_model_folders(self, folder: Path, engine: str) -> None:
        extra = {"draft_model": "draft.gguf", "lora": [{"path": "adapter.gguf", "scale": 2}], "n_keep": 3}
        found = launch_spec.model_spec(make_model(engine=engine, extra_args=extra), "chat").extra_args
        assert found == {
            "draft_model": str(folder / "draft.gguf"),
            "lora": [{"path": str(folder / "adapter.gguf"), "scale": 2}],
            "n_keep": 3,
        }

    @pytest.mark.parametrize("path", ["/etc/passwd", "../outside.gguf", "link.gguf", "nowhere.gguf"])
    @pytest.mark.parametrize("setting", ["mmproj", "lora"])
    @pytest.mark.usefixtures("folder")
    def test_other_files_are_refused(self, engine: str, setting: str, path: str) -> None:
        extra = {setting: [{"path": path}] if setting == "lora" else path}
        with pytest.raises(PathNotAllowed):
            launch_spec.model_spec(make_model(engine=engine, extra_args=extra), "chat")

    @pytest.mark.usefixtures("folder")
    def test_what_is_no_path_stays_for_the_engine_to_refuse(self, engine: str) -> None:
        extra = {"draft_model": 7, "lora": "x", "nosuch": "y"}
        assert launch_spec.model_spec(make_model(engine=engine, extra_args=extra), "chat").extra_args == extra


def test_every_setting_is_documented() -> None:
    told = (Path(settings.BASE_DIR) / "docs" / "engines.md").read_text()
    names = {*OPTIONS, *llama_server_options.OPTIONS}
    assert [name for name in sorted(names) if f"`{name.removeprefix('sampling.')}`" not in told] == []


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - llama_server_options.OPTIONS.keys()))
def test_what_llama_server_has_no_flag_for_is_documented_as_such(name: str) -> None:
    told = (Path(settings.BASE_DIR) / "docs" / "engines.md").read_text()
    assert re.search(rf"`embedded` alone: [^|]*`{name.removeprefix('sampling.')}`", told)
