"""The engine llama-server on a real binary and real models, through provisioning."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from pytest_django.fixtures import Settings

from models_app import provisioning, runtime_folder
from models_app.engines.llama_server_binary import inspect
from models_app.engines.llama_server_options import SAID, LoadMode, LoraFiles, Toggled, Valued
from models_app.models import State
from models_app.ports import bindable
from models_app.process_identity import alive
from tests.models.conftest import Client, Start
from tests.models.test_provisioning import settle

pytestmark = pytest.mark.engine
PROMPT = "A secret of zanzibar: say hello."


@pytest.fixture
def start(settings: Settings, llama_server: Path, start_engine: Start) -> Start:
    settings.ASSISTANT_LLAMA_SERVER = str(llama_server)
    return functools.partial(start_engine, engine="llama-server")


def test_every_setting_has_a_flag_that_the_real_binary_knows(llama_server: Path) -> None:
    binary = inspect(str(llama_server))
    unknown = [name for name, said in SAID.items() if not all(map(binary.spelling, spelled(said)))]
    assert unknown == []


def spelled(said: Valued | Toggled | LoadMode | LoraFiles) -> list[str]:
    """The newest spellings of a setting's flags, apart from those whose newest this binary need not have."""
    if isinstance(said, Valued):
        return [said.names[0]]
    if isinstance(said, Toggled):
        return [names[0] for names in (said.on, said.off) if names]
    return ["--lora", "--lora-scaled"] if isinstance(said, LoraFiles) else []


@pytest.mark.django_db
@pytest.mark.usefixtures("valkey")
class TestRealServer:
    def test_it_becomes_ready_answers_with_its_key_alone_and_leaves_nothing(self, start: Start, engine_client: Client) -> None:
        instance = start(extra_args={"sampling.temp": 0.0, "warmup": False})
        assert instance.state == State.READY, instance.exit_reason
        http = engine_client(instance)
        assert http.get("/props").json()["total_slots"] == 2
        assert [slot["n_ctx"] for slot in http.get("/slots").json()] == [512, 512]
        answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8})
        assert answer.json()["choices"][0]["message"]["content"]
        for path in ("/slots", "/props", "/metrics"):
            assert http.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
        log = "\n".join(runtime_folder.last_log_lines(provisioning.folder_of(instance), 500))
        assert "listening on" in log
        assert "zanzibar" not in log
        processes = provisioning.living(instance)
        assert len(processes) == 2
        provisioning.stop(instance)
        settle(instance)
        assert instance.state == State.STOPPED
        assert not any(map(alive, processes))
        assert instance.port is None or bindable(instance.port)

    def test_a_part_for_embeddings_answers_vectors_of_inputs_longer_than_the_usual_batch(
        self, start: Start, engine_client: Client, embedding_model: Path
    ) -> None:
        instance = start("embedding", embedding_model_path=str(embedding_model), ctx_size=4096, batch_size=64)
        assert instance.state == State.READY, instance.exit_reason
        answer = engine_client(instance).post("/v1/embeddings", json={"input": ["word " * 400, "hello"]}).json()
        assert [len(one["embedding"]) for one in answer["data"]] == [384, 384]

    def test_settings_reach_the_engine(self, start: Start, engine_client: Client) -> None:
        instance = start(
            prompt_template="llama2",
            threads=1,
            extra_args={
                "sampling.grammar": 'root ::= "indeed"', "cpus": "0", "load_mode": "none", "split_mode": "none",
                "tensor_split": [1], "flash_attn_type": "disabled", "cache_ram_mib": 0, "n_predict": 20,
            },
        )  # fmt: skip
        assert instance.state == State.READY, instance.exit_reason
        http = engine_client(instance)
        chat = {"messages": [{"role": "user", "content": "Hi"}]}
        assert http.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"] == "indeed"
        assert "[INST]" in http.post("/apply-template", json=chat).json()["prompt"]
