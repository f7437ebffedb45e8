"""Estimates of memory against what real engines log and hold, and against arithmetic done by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models_app import engine_memory, launch_spec, memory_estimate, runtime_folder
from models_app.engines import gguf
from models_app.engines.gguf import GgufHeader
from models_app.exceptions import PreflightError
from models_app.memory_estimate import MIB, Need, Run, all_of, cache_bytes, compute_bytes, estimate, largest_ctx, program
from models_app.models import ModelConfig, State
from tests.fakes import gguf_files
from tests.models.conftest import Client, Start

# What the embedded engine logged for the demo model (“KV buffer size”, “compute buffer size”, MiB).
LOGGED = [
    (Run(512), 11.25, 15.14),
    (Run(2048, slots=4), 45.0, 15.14),
    (Run(300), 11.25, 8.87),
    (Run(8192), 180.0, 22.64),
    (Run(16384, slots=4), 360.0, 18.64),
    (Run(4096, slots=2, micro_batch=128), 90.0, 4.16),
    (Run(8192, micro_batch=2048), 180.0, 90.57),
    (Run(8192, slots=2, flash=False), 180.0, 87.51),
    (Run(8192, flash=False), 180.0, 167.51),
    (Run(8192, slots=2, type_k="q8_0", type_v="q8_0"), 95.62, 18.67),
    (Run(8192, slots=2, unified=True), 180.0, 22.64),
]
# The same for Gemma 3 270M, of whose 18 layers every sixth attends to everything and the others to 512 tokens.
LOGGED_WINDOWS = [
    (Run(512), 9.0, 19.28),
    (Run(8192, slots=2), 54.0, 23.28),
    (Run(8192), 39.0, 27.28),
    (Run(8192, slots=2, window_full=True), 144.0, 26.28),
    (Run(8192, slots=2, unified=True), 46.5, 27.78),
]


def check_against_log(header: GgufHeader, run: Run, context_mib: float, compute_mib: float) -> None:
    assert sum(cache_bytes(header, run)) / MIB == pytest.approx(context_mib, abs=0.01)
    assert compute_mib <= compute_bytes(header, run) / MIB <= 1.14 * compute_mib


@pytest.mark.parametrize(("run", "context_mib", "compute_mib"), LOGGED)
def test_context_and_buffers_are_what_the_engine_logged(
    demo_model: Path, run: Run, context_mib: float, compute_mib: float
) -> None:
    check_against_log(gguf.read_header(demo_model), run, context_mib, compute_mib)


def gemma(path: Path, **more: Any) -> GgufHeader:
    """The header of Gemma 3 270M, without its tensors but the embedding."""
    values: gguf_files.Values = {
        "general.architecture": "gemma3",
        "gemma3.block_count": 18,
        "gemma3.embedding_length": 640,
        "gemma3.feed_forward_length": 2048,
        "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": 1,
        "gemma3.attention.key_length": 256,
        "gemma3.attention.value_length": 256,
        "gemma3.attention.sliding_window": 512,
        **more,
    }
    return gguf.read_header(gguf_files.write(path, values, {"token_embd.weight": ((640, 262_144), gguf_files.Q8_0)}))


@pytest.mark.parametrize(("run", "context_mib", "compute_mib"), LOGGED_WINDOWS)
def test_sliding_windows_bound_the_context_as_the_engine_logged(
    tmp_path: Path, run: Run, context_mib: float, compute_mib: float
) -> None:
    check_against_log(gemma(tmp_path / "g.gguf"), run, context_mib, compute_mib)


def test_a_file_may_say_itself_which_layers_have_a_window(tmp_path: Path) -> None:
    pattern = {"gemma3.attention.sliding_window_pattern": [True, False]}
    header = gemma(tmp_path / "g.gguf", **pattern)
    by_layer = cache_bytes(header, Run(8192))
    assert by_layer[0] == by_layer[2] == 1024 * 1024  # (512 + 512) cells of 2 × 256 × 2 bytes
    assert by_layer[1] == 8192 * 1024


@pytest.mark.engine
@pytest.mark.django_db
def test_a_real_engine_holds_what_was_estimated(start_engine: Start, engine_client: Client, demo_model: Path) -> None:
    """Private memory in use after a prompt that fills a micro batch, and the context by its own log."""
    instance = start_engine(
        "chat", ctx_size=1536, slots=2, batch_size=256, extra_args={"n_ubatch": 256, "cache_ram_mib": 0, "verbosity": 4}
    )
    assert instance.state == State.READY
    answer = engine_client(instance).post("/v1/completions", json={"prompt": "word " * 600, "max_tokens": 8})
    assert answer.status_code == 200
    assert instance.model is not None
    need = engine_memory.need_of_spec("embedded", launch_spec.model_spec(instance.model, "chat"), has_gpu=False)
    held = psutil.Process(instance.pid).memory_info()
    estimated = need.private - need.margin
    assert 0 <= estimated - (held.rss - held.shared) <= 24 * MIB
    assert need.mapped <= held.shared <= need.mapped + 40 * MIB  # the weights, and the libraries
    log = "\n".join(runtime_folder.last_log_lines(runtime_folder.path(instance.pk, instance.generation), 10_000))
    assert f"KV buffer size = {need.cache / MIB:8.2f} MiB" in log


def test_weights_are_the_file_and_are_shared_while_they_are_mapped(tmp_path: Path) -> None:
    path = gguf_files.llama(tmp_path / "m.gguf")
    header = gguf.read_header(path)
    mapped = estimate(header, Run(512))
    assert (mapped.files, mapped.weights) == ({str(path): path.stat().st_size}, 0)
    read = estimate(header, Run(512, mapped=False))
    assert (read.files, read.weights) == ({}, path.stat().st_size)


def test_rearranged_weights_belong_to_the_process(tmp_path: Path) -> None:
    path = gguf_files.llama(tmp_path / "m.gguf", layers=2, embedding=64, kind=gguf_files.Q4_0)
    need = estimate(gguf.read_header(path), Run(512, repacked=frozenset({gguf_files.Q4_0})))
    assert need.weights == 2 * gguf_files.tensor_bytes((64, 64 + 32 + 32 + 256), gguf_files.Q4_0)
    assert need.weights + need.mapped == path.stat().st_size


def test_the_last_layers_go_to_the_gpu_first(tmp_path: Path) -> None:
    header = gguf.read_header(gguf_files.llama(tmp_path / "m.gguf", layers=4))
    block = header.block_bytes()[0]
    none, half, whole = (estimate(header, Run(512, gpu_layers=layers)) for layers in (0, 2, -1))
    cache = cache_bytes(header, Run(512))[0]
    assert none.gpu == 0
    assert half.gpu == 2 * block + 2 * cache + half.compute
    assert half.cache == 2 * cache
    embedding = gguf_files.tensor_bytes((64, 256), gguf_files.F16)
    assert whole.gpu == 4 * block + embedding + 4 * cache + whole.compute
    assert whole.cache == 0
    kept = estimate(header, Run(512, gpu_layers=-1, cache_on_gpu=False))
    assert kept.cache == 4 * cache


def make(path: Path, architecture: str, layers: int, **values: Any) -> GgufHeader:
    own = {f"{architecture}.{key.replace('__', '.')}": value for key, value in values.items()}
    header: gguf_files.Values = {"general.architecture": architecture, f"{architecture}.block_count": layers, **own}
    return gguf.read_header(gguf_files.write(path, header, {}))


def test_an_encoder_keeps_no_context(tmp_path: Path) -> None:
    header = make(tmp_path / "e.gguf", "bert", 6, embedding_length=384, attention__head_count=12)
    assert sum(cache_bytes(header, Run(512))) == 0
    assert compute_bytes(header, Run(512, flash=False)) > 512 * 512 * 12 * 4


def test_a_recurrent_model_keeps_one_state_for_each_slot(tmp_path: Path) -> None:
    state = {"ssm__conv_kernel": 4, "ssm__inner_size": 1536, "ssm__state_size": 16, "ssm__group_count": 0}
    header = make(tmp_path / "m.gguf", "mamba", 2, embedding_length=768, attention__head_count_kv=0, **state)
    one = 4 * (3 * 1536 + 16 * 1536)
    assert cache_bytes(header, Run(512, slots=3)) == [3 * one] * 2
    assert cache_bytes(header, Run(8192, slots=3)) == [3 * one] * 2


def test_a_hybrid_keeps_a_state_where_it_has_no_attention(tmp_path: Path) -> None:
    state = {"ssm__conv_kernel": 4, "ssm__inner_size": 128, "ssm__state_size": 16, "ssm__group_count": 1}
    attention = {"attention__head_count": 4, "attention__key_length": 64, "attention__value_length": 64}
    header = make(tmp_path / "h.gguf", "jamba", 2, embedding_length=256, attention__head_count_kv=[0, 2], **attention, **state)
    assert cache_bytes(header, Run(512)) == [4 * (3 * (128 + 2 * 16) + 16 * 128), 512 * 2 * (64 + 64) * 2]


def test_latent_attention_keeps_one_vector_a_token(tmp_path: Path) -> None:
    latent = {"attention__key_length_mla": 192, "attention__value_length_mla": 128, "attention__kv_lora_rank": 512}
    attention = {"attention__head_count_kv": 1, "attention__key_length": 576, "attention__value_length": 512}
    header = make(tmp_path / "d.gguf", "deepseek2", 1, embedding_length=2048, **attention, **latent)
    assert cache_bytes(header, Run(512)) == [512 * 576 * 2]


def test_what_was_measured_counts_where_it_is_more() -> None:
    need = Need(cache=100 * MIB)
    assert replace(need, measured=50 * MIB).private == need.private == 116 * MIB
    assert replace(need, measured=200 * MIB).private == 216 * MIB


@pytest.fixture
def config(tmp_path: Path, settings: Any) -> ModelConfig:
    settings.ASSISTANT_MODEL_DIRS = [tmp_path]
    gguf_files.llama(tmp_path / "m.gguf", context_length=1024)
    return ModelConfig(name="m", chat_model_path="m.gguf", ctx_size=2048, slots=2)


def need_of(config: ModelConfig, part: str = "chat", has_gpu: bool = False, **extra: Any) -> Need:
    config.extra_args = extra
    return engine_memory.need_of_spec(config.engine, launch_spec.model_spec(config, part), has_gpu)


def test_engine_settings_reach_the_estimate(config: ModelConfig) -> None:
    plain = need_of(config)
    assert plain.prompt_cache == 256 * MIB
    assert need_of(config, cache_ram_mib=8).prompt_cache == 8 * MIB
    assert need_of(config, cache_type_k="q8_0", cache_type_v="q8_0").cache == plain.cache * 34 // 64
    assert need_of(config, load_mode="none").files == {}
    assert need_of(config, n_ubatch=64).compute < plain.compute
    assert need_of(config, flash_attn_type="disabled").compute > plain.compute


def test_gpu_layers_count_only_where_there_is_a_gpu(config: ModelConfig) -> None:
    config.gpu_layers = -1
    assert need_of(config).gpu == 0
    assert need_of(config, has_gpu=True).gpu > 0


def test_an_embedding_model_has_no_more_context_than_it_was_trained_for(config: ModelConfig) -> None:
    config.embedding_model_path = "m.gguf"
    chat, embedding = need_of(config), need_of(config, "embedding")
    assert embedding.cache * 2 == chat.cache
    assert embedding.prompt_cache == 0


def test_a_draft_model_has_a_context_of_its_own(config: ModelConfig, tmp_path: Path) -> None:
    draft = gguf_files.llama(tmp_path / "draft.gguf", layers=1)
    both = need_of(config, draft_model="draft.gguf")
    assert both.cache == need_of(config).cache * 3 // 2
    assert set(both.files) == {str(tmp_path / "m.gguf"), str(draft)}


def test_wasmedge_serves_one_request_and_both_models_in_one_process(config: ModelConfig, tmp_path: Path) -> None:
    gguf_files.llama(tmp_path / "e.gguf")
    config.engine, config.embedding_model_path, config.one_process = "wasmedge", "e.gguf", True
    whole = need_of(config, "whole")
    assert set(whole.files) == {str(tmp_path / "m.gguf"), str(tmp_path / "e.gguf")}
    assert whole.prompt_cache == 0
    assert whole.cache == 2 * sum(cache_bytes(gguf.read_header(tmp_path / "m.gguf"), Run(2048)))


def test_a_file_that_is_no_model_is_said_so(config: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"<html>")
    with pytest.raises(PreflightError, match="saved web answer"):
        need_of(config)


@settings(max_examples=100, deadline=None)
@given(st.integers(64, 40_000), st.integers(0, 400))
def test_the_largest_context_fits_and_the_next_does_not(most: int, free_mib: int) -> None:
    def needed(ctx: int) -> Need:
        return all_of([program(), Need(cache=ctx * 10_000)])

    found = largest_ctx(needed, most, free_mib * MIB, 0)
    if found is None:
        assert most < 256 or needed(256).host > free_mib * MIB
        return
    assert found <= most
    assert needed(found).host <= free_mib * MIB
    assert found + 256 > most or needed(found + 256).host > free_mib * MIB


@settings(max_examples=60, deadline=None)
@given(st.integers(64, 20_000), st.integers(1, 8), st.integers(1, 2048), st.booleans(), st.booleans())
def test_more_of_anything_never_needs_less(
    demo_model: Path, context: int, slots: int, batch: int, flash: bool, unified: bool
) -> None:
    header = gguf.read_header(demo_model)
    run = Run(context * slots, slots, batch, flash=flash, unified=unified)
    base = estimate(header, run).host
    assert estimate(header, replace(run, context=(context + 256) * slots)).host >= base
    assert estimate(header, replace(run, slots=slots + 1, context=context * (slots + 1))).host >= base
    assert estimate(header, replace(run, micro_batch=batch + 64)).host >= base


def test_cache_types_have_ggmls_sizes() -> None:
    sizes = {name: memory_estimate.element_bytes(name) for name in ("f32", "f16", "q8_0", "q4_0")}
    assert sizes == {"f32": 4.0, "f16": 2.0, "q8_0": 1.0625, "q4_0": 0.5625}
