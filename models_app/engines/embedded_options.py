"""The embedded engine's allow-list: which of llama.cpp's parameters an administrator may set, and to what. Pure.

Listen address, keys, log and slot files, static paths, model URLs and tool or MCP switches are not here, so they are
refused like any unknown name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models_app.engines.options import Number, Option, Switch, Whole, Word, check
from models_app.exceptions import PreflightError


@dataclass(frozen=True, slots=True)
class Member(Word):
    """A member of one of the library's enumerations: `prefix` + the word in capitals, in `enum`."""

    enum: str
    prefix: str


_CACHE_TYPE = Member(("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"), "ggml_type", "GGML_TYPE_")

# By the name of the attribute of CommonParams, `sampling.` those of its sampling defaults.
OPTIONS: dict[str, Option] = {
    "cache_prompt": Switch(),
    "cache_ram_mib": Whole(0, 1 << 20),  # prompts of idle slots kept in memory
    "cache_type_k": _CACHE_TYPE,
    "cache_type_v": _CACHE_TYPE,
    "flash_attn_type": Member(("auto", "disabled", "enabled"), "llama_flash_attn_type", "LLAMA_FLASH_ATTN_TYPE_"),
    "kv_unified": Switch(),
    "load_mode": Member(("auto", "none", "mmap", "mlock", "mmap_mlock", "direct_io"), "llama_load_mode", "LLAMA_LOAD_MODE_"),
    "main_gpu": Whole(0, 127),
    "n_cache_reuse": Whole(0, 1 << 20),
    "n_keep": Whole(-1, 1 << 20),
    "n_predict": Whole(-1, 1 << 20),
    "n_threads_http": Whole(1, 256),
    "n_ubatch": Whole(1, 1 << 16),
    "no_kv_offload": Switch(),
    "no_op_offload": Switch(),
    "no_perf": Switch(),
    "numa": Member(("disabled", "distribute", "isolate", "numactl"), "ggml_numa_strategy", "GGML_NUMA_STRATEGY_"),
    "prefill_assistant": Switch(),
    "reasoning_format": Member(("none", "auto", "deepseek"), "common_reasoning_format", "COMMON_REASONING_FORMAT_"),
    "rope_freq_base": Number(0.0, 1e9),
    "rope_freq_scale": Number(0.0, 1e6),
    "sampling.min_p": Number(0.0, 1.0),
    "sampling.penalty_freq": Number(-2.0, 2.0),
    "sampling.penalty_present": Number(-2.0, 2.0),
    "sampling.penalty_repeat": Number(0.0, 10.0),
    "sampling.seed": Whole(0, (1 << 32) - 1),
    "sampling.temp": Number(0.0, 10.0),
    "sampling.top_k": Whole(0, 1 << 20),
    "sampling.top_p": Number(0.0, 1.0),
    "slot_prompt_similarity": Number(0.0, 1.0),
    "split_mode": Member(("none", "layer", "row"), "llama_split_mode", "LLAMA_SPLIT_MODE_"),
    "sse_ping_interval": Whole(1, 3600),  # seconds
    "swa_full": Switch(),
    "verbosity": Whole(0, 5),
    "warmup": Switch(),
}

# llama.cpp's built-in chat templates, by name.
TEMPLATES = frozenset({
    "bailing", "bailing-think", "bailing2", "chatglm3", "chatglm4", "chatml", "command-r", "deepseek", "deepseek2", "deepseek3",
    "deepseek-ocr", "exaone-moe", "exaone3", "exaone4", "falcon3", "gemma", "gigachat", "glmedge", "gpt-oss", "granite",
    "granite-4.0", "granite-4.1", "grok-2", "hunyuan-dense", "hunyuan-moe", "hunyuan-vl", "kimi-k2", "llama2", "llama2-sys",
    "llama2-sys-bos", "llama2-sys-strip", "llama3", "llama4", "megrez", "minicpm", "mistral-v1", "mistral-v3",
    "mistral-v3-tekken", "mistral-v7", "mistral-v7-tekken", "monarch", "openchat", "orion", "pangu-embedded", "phi3", "phi4",
    "rwkv-world", "seed_oss", "smolvlm", "solar-open", "vicuna", "vicuna-orca", "yandex", "zephyr",
})  # fmt: skip


def check_options(values: Mapping[str, Any]) -> None:
    """Raise PreflightError naming the first option that is refused, unknown or out of range, and what is allowed."""
    check(OPTIONS, values)


def check_template(name: str) -> None:
    """Raise PreflightError unless the name is empty or a built-in chat template."""
    if name and name not in TEMPLATES:
        raise PreflightError(
            f"prompt_template “{name}” is not built in; leave it empty or choose one of: {', '.join(sorted(TEMPLATES))}."
        )


def as_attributes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Checked options as the server process applies them: words become {"enum", "member"}."""
    return {name: _attribute(OPTIONS[name], value) for name, value in values.items()}


def _attribute(option: Option, value: Any) -> Any:
    if isinstance(option, Member):
        return {"enum": option.enum, "member": option.prefix + str(value).upper()}
    return float(value) if isinstance(option, Number) else value
