"""The embedded engine's embedding models, further files and settings, on real weights; and what it says in its log."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest

from models_app import engine_access, provisioning, runtime_folder
from models_app.engines.base import Launch
from models_app.engines.embedded import EmbeddedEngine
from models_app.exceptions import PreflightError
from models_app.models import Instance, State
from tests.fakes import gguf_files
from tests.models.conftest import Client, Start
from tests.models.instances import make_instance
from tests.models.test_embedded import spec
from tests.models.test_provisioning import settle

ENGINE = EmbeddedEngine(engine_access.engine_settings())
RANK = 4  # llama_pooling_type
LONG = "The river rose again in spring and the old mill stood in water up to its windows. " * 24  # some 430 tokens


def written(file: Path, **changes: Any) -> dict[str, Any]:
    """spec.json of an embedding part."""
    wanted = spec(None, part="embedding", embedding_model_path=file, **changes)
    command = ENGINE.command(Launch(wanted, 7, 2, 20_007, "sekret", Path("/run/7/2")))
    found: dict[str, Any] = json.loads(command.files["spec.json"])
    return found


def test_an_embedding_model_s_context_ends_where_its_training_did_and_one_batch_holds_it(tmp_path: Path) -> None:
    file = gguf_files.llama(tmp_path / "m.gguf", context_length=512)
    sizes = ("n_ctx", "n_parallel", "n_batch", "n_ubatch")
    assert [written(file, ctx_size=8192)[size] for size in sizes] == [1536, 3, 512, 512]
    assert [written(file, ctx_size=300, extra_args={"n_ubatch": 64})[size] for size in sizes] == [900, 3, 300, 300]


@pytest.mark.parametrize(("wanted", "made"), [("auto", "mean"), ("last", "last"), ("cls", "cls")])
def test_a_file_that_names_no_pooling_gets_the_mean_unless_another_is_wanted(tmp_path: Path, wanted: str, made: str) -> None:
    file = gguf_files.llama(tmp_path / "m.gguf")
    assert written(file, extra_args={"pooling_type": wanted})["pooling"] == made


def test_a_file_s_own_pooling_stands_and_a_reranker_is_refused(tmp_path: Path) -> None:
    assert written(gguf_files.llama(tmp_path / "cls.gguf", pooling_type=2))["pooling"] == ""
    with pytest.raises(PreflightError, match="is a reranker, which gives no embeddings"):
        written(gguf_files.llama(tmp_path / "rank.gguf", pooling_type=RANK))


def test_settings_of_the_other_kind_of_process_are_left_out(tmp_path: Path) -> None:
    file = gguf_files.llama(tmp_path / "m.gguf")
    extra = {"sampling.temp": 1, "draft_model": "/d", "embd_normalize": -1, "cache_ram_mib": 0, "pooling_type": "cls"}
    assert written(file, extra_args=extra)["options"] == {"embd_normalize": -1, "cache_ram_mib": 0}
    chat = ENGINE.command(Launch(spec(file, extra_args=extra), 7, 2, 20_007, "sekret", Path("/run/7/2")))
    assert json.loads(chat.files["spec.json"])["options"].keys() == {
        *("sampling.temp", "cache_ram_mib", "speculative.draft.mparams.path", "speculative.types")
    }


def cosine(one: list[float], other: list[float]) -> float:
    return sum(map(float.__mul__, one, other)) / (math.hypot(*one) * math.hypot(*other))


def vectors(client: httpx.Client, texts: list[str]) -> list[list[float]]:
    answer = client.post("/v1/embeddings", json={"input": texts})
    assert answer.status_code == 200, answer.text
    return [one["embedding"] for one in answer.json()["data"]]


def log_of(instance: Instance) -> str:
    return "\n".join(runtime_folder.last_log_lines(provisioning.folder_of(instance), 500))


@pytest.mark.engine
@pytest.mark.django_db
@pytest.mark.usefixtures("valkey")
class TestRealEmbeddings:
    def test_vectors_mean_something_and_do_not_depend_on_their_neighbours(
        self, start_engine: Start, engine_client: Client, embedding_model: Path
    ) -> None:
        instance = start_engine("embedding", embedding_model_path=str(embedding_model), ctx_size=4096, batch_size=64)
        assert instance.state == State.READY, instance.exit_reason
        client = engine_client(instance)
        texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose by a quarter point.", LONG]
        together = vectors(client, texts)
        alone = [vectors(client, [text])[0] for text in texts]
        assert [len(vector) for vector in together] == [384] * 4
        assert min(map(cosine, together, alone)) >= 0.999
        assert cosine(together[0], together[1]) > 0.5 > cosine(together[0], together[2])
        assert [slot["n_ctx"] for slot in client.get("/slots").json()] == [512, 512]
        assert "loading" in log_of(instance)
        assert "embedding model (pooling as in its file) “smol”: 2 × 512 tokens of context, batch 512" in log_of(instance)
        assert "the old mill" not in log_of(instance)

    def test_an_input_beyond_the_context_is_an_error_of_the_request_alone(
        self, start_engine: Start, engine_client: Client, embedding_model: Path
    ) -> None:
        client = engine_client(start_engine("embedding", embedding_model_path=str(embedding_model)))
        answer = client.post("/v1/embeddings", json={"input": LONG * 2})
        assert answer.is_error
        assert "too large to process" in answer.json()["error"]["message"]
        assert len(vectors(client, ["short"])[0]) == 384

    def test_chat_and_embedding_of_one_model_are_two_processes(
        self, start_engine: Start, engine_client: Client, embedding_model: Path
    ) -> None:
        chat = start_engine(embedding_model_path=str(embedding_model))
        embedding = make_instance(model=chat.model, part="embedding")
        assert provisioning.provision(embedding), embedding.exit_reason
        assert settle(embedding).state == chat.state == State.READY
        assert len(vectors(engine_client(embedding), ["hello"])[0]) == 384
        assert engine_client(embedding).post("/v1/chat/completions", json={"messages": []}).status_code >= 400
        assert engine_client(chat).post("/v1/embeddings", json={"input": "hello"}).status_code >= 400
        assert provisioning.kill(embedding)

    def test_a_chat_model_gives_embeddings_too(self, start_engine: Start, engine_client: Client) -> None:
        client = engine_client(start_engine("embedding"))
        together = vectors(client, ["hello there", LONG])
        assert cosine(together[1], vectors(client, [LONG])[0]) >= 0.999
        assert [len(vector) for vector in together] == [576, 576]


def ask(client: httpx.Client, text: str, **more: Any) -> dict[str, Any]:
    answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": text}], "max_tokens": 12, **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.engine
@pytest.mark.django_db
@pytest.mark.usefixtures("valkey")
class TestRealSettings:
    def test_a_grammar_binds_every_answer_and_prompts_stay_out_of_the_log(
        self, start_engine: Start, engine_client: Client
    ) -> None:
        instance = start_engine(
            extra_args={"sampling.grammar": 'root ::= "indeed"', "cpus": "0", "priority": "normal"}, threads=1
        )
        assert instance.state == State.READY, instance.exit_reason
        answer = ask(engine_client(instance), "A secret of zanzibar: say hello.")
        assert answer["choices"][0]["message"]["content"] == "indeed"
        log = log_of(instance)
        assert "as chat model “smol”: 2 × 512 tokens of context, batch 512, threads 1, GPU layers 0" in log
        assert f"“smol” serves on http://127.0.0.1:{instance.port}" in log
        assert "zanzibar" not in log

    def test_a_draft_model_drafts(self, start_engine: Start, engine_client: Client, demo_model: Path) -> None:
        instance = start_engine(extra_args={"draft_model": demo_model.name, "draft_n_max": 4, "sampling.temp": 0.0}, slots=1)
        assert instance.state == State.READY, instance.exit_reason
        assert ask(engine_client(instance), "Count from one to ten.")["timings"]["draft_n"] > 0

    def test_an_adapter_is_loaded_at_its_scale(self, start_engine: Start, engine_client: Client, tmp_path: Path) -> None:
        width, rank = 576, 4
        gguf_files.write(
            tmp_path / "adapter.gguf",
            {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0},
            {
                "blk.0.attn_q.weight.lora_a": ((width, rank), gguf_files.F32),
                "blk.0.attn_q.weight.lora_b": ((rank, width), gguf_files.F32),
            },
        )
        instance = start_engine(extra_args={"lora": [{"path": "adapter.gguf", "scale": 0.5}]})
        assert instance.state == State.READY, instance.exit_reason
        (adapter,) = engine_client(instance).get("/lora-adapters").json()
        assert (adapter["path"], adapter["scale"]) == (str(tmp_path / "adapter.gguf"), 0.5)
