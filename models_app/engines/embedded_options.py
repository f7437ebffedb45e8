"""The embedded engine's allow-list: which of llama.cpp's parameters an administrator may set, and to what. Pure.

Listen address, keys, log and slot files, static paths, model URLs and tool or MCP switches are not here, so they are
refused like any unknown name. The names mean the same to the engine llama-server, as far as its flags go.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models_app.engines.options import (
    Adapters,
    Cpus,
    File,
    Number,
    Option,
    Shares,
    Switch,
    Table,
    Text,
    Whole,
    Word,
    Words,
    check,
    cpu_numbers,
)
from models_app.exceptions import PreflightError

MAX_CPUS = 512  # GGML_MAX_N_THREADS
MAX_GPUS = 128


@dataclass(frozen=True, slots=True)
class Member(Word):
    """A member of one of the library's enumerations: `prefix` + the word in capitals, in `enum`."""

    enum: str
    prefix: str


_CACHE_TYPE = Member(("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"), "ggml_type", "GGML_TYPE_")
_TOKENS = Whole(0, 1 << 20)
_ROPE_TYPES = ("none", "linear", "yarn", "longrope")
_SPECULATIONS = ("draft_simple", "draft_eagle3", "draft_mtp", "ngram_simple", "ngram_map_k", "ngram_map_k4v", "ngram_mod")
_SAMPLERS = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature", "infill", "adaptive_p")

# By the name of the attribute of CommonParams, `sampling.` those of its sampling defaults, or by a name of _MADE below.
OPTIONS: dict[str, Option] = {
    # Memory: context, cache of prompts, how weights are brought in
    "cache_idle_slots": Switch(),
    "cache_prompt": Switch(),
    "cache_ram_mib": Whole(0, 1 << 20),  # prompts of idle slots kept in memory
    "cache_type_k": _CACHE_TYPE,
    "cache_type_v": _CACHE_TYPE,
    "check_tensors": Switch(),
    "checkpoint_min_step": _TOKENS,
    "cont_batching": Switch(),
    "ctx_shift": Switch(),
    "flash_attn_type": Member(("auto", "disabled", "enabled"), "llama_flash_attn_type", "LLAMA_FLASH_ATTN_TYPE_"),
    "kv_unified": Switch(),
    "load_mode": Member(("auto", "none", "mmap", "mlock", "mmap_mlock", "direct_io"), "llama_load_mode", "LLAMA_LOAD_MODE_"),
    "n_cache_reuse": _TOKENS,
    "n_ctx_checkpoints": Whole(0, 1024),
    "n_keep": Whole(-1, 1 << 20),
    "n_predict": Whole(-1, 1 << 20),
    "n_ubatch": Whole(1, 1 << 16),
    "slot_prompt_similarity": Number(0.0, 1.0),
    "swa_full": Switch(),
    "warmup": Switch(),
    # Processors and GPUs
    "cpus": Cpus(MAX_CPUS),
    "main_gpu": Whole(0, MAX_GPUS - 1),
    "no_extra_bufts": Switch(),
    "no_host": Switch(),
    "no_kv_offload": Switch(),
    "no_op_offload": Switch(),
    "no_perf": Switch(),
    "numa": Member(("disabled", "distribute", "isolate", "numactl"), "ggml_numa_strategy", "GGML_NUMA_STRATEGY_"),
    "poll": Whole(0, 100),
    "priority": Member(("low", "normal", "medium", "high"), "ggml_sched_priority", "GGML_SCHED_PRIO_"),
    "split_mode": Member(("none", "layer", "row", "tensor"), "llama_split_mode", "LLAMA_SPLIT_MODE_"),
    "strict_cpu": Switch(),
    "tensor_split": Shares(MAX_GPUS),
    # Longer contexts than trained
    "rope_freq_base": Number(0.0, 1e9),
    "rope_freq_scale": Number(0.0, 1e6),
    "rope_scaling_type": Member(_ROPE_TYPES, "llama_rope_scaling_type", "LLAMA_ROPE_SCALING_TYPE_"),
    "yarn_attn_factor": Number(-1.0, 100.0),
    "yarn_beta_fast": Number(-1.0, 1000.0),
    "yarn_beta_slow": Number(-1.0, 1000.0),
    "yarn_ext_factor": Number(-1.0, 100.0),
    "yarn_orig_ctx": Whole(0, 1 << 24),
    # Further files: adapters, a projector for images, a draft model
    "image_max_tokens": Whole(-1, 1 << 16),
    "image_min_tokens": Whole(-1, 1 << 16),
    "lora": Adapters(16),
    "lora_init_without_apply": Switch(),
    "mmproj": File(),
    "mmproj_use_gpu": Switch(),
    "draft_cache_type_k": _CACHE_TYPE,
    "draft_cache_type_v": _CACHE_TYPE,
    "draft_gpu_layers": Whole(0, 999),
    "draft_model": File(),
    "draft_n_max": Whole(1, 64),
    "draft_n_min": Whole(0, 64),
    "draft_p_min": Number(0.0, 1.0),
    "speculative": Words(_SPECULATIONS),
    # Chat: template, thinking, what a request may leave open
    "chat_template_kwargs": Table(4096),
    "force_pure_content_parser": Switch(),
    "prefill_assistant": Switch(),
    "reasoning": Word(("auto", "on", "off")),
    "reasoning_budget": Whole(-1, 1 << 20),
    "reasoning_budget_message": Text(1000),
    "reasoning_format": Member(
        ("none", "auto", "deepseek", "deepseek_legacy"), "common_reasoning_format", "COMMON_REASONING_FORMAT_"
    ),
    "special": Switch(),
    "sampling.adaptive_decay": Number(0.0, 0.99),
    "sampling.adaptive_target": Number(-1.0, 1.0),
    "sampling.dry_allowed_length": _TOKENS,
    "sampling.dry_base": Number(0.0, 100.0),
    "sampling.dry_multiplier": Number(0.0, 100.0),
    "sampling.dry_penalty_last_n": Whole(-1, 1 << 20),
    "sampling.dynatemp_exponent": Number(0.0, 10.0),
    "sampling.dynatemp_range": Number(0.0, 10.0),
    "sampling.grammar": Text(8192, means="a GBNF grammar"),
    "sampling.ignore_eos": Switch(),
    "sampling.min_keep": Whole(0, 1000),
    "sampling.min_p": Number(0.0, 1.0),
    "sampling.mirostat": Whole(0, 2),
    "sampling.mirostat_eta": Number(0.0, 10.0),
    "sampling.mirostat_tau": Number(0.0, 100.0),
    "sampling.n_probs": Whole(0, 100),
    "sampling.penalty_freq": Number(-2.0, 2.0),
    "sampling.penalty_last_n": Whole(-1, 1 << 20),
    "sampling.penalty_present": Number(-2.0, 2.0),
    "sampling.penalty_repeat": Number(0.0, 10.0),
    "sampling.samplers": Words(_SAMPLERS),
    "sampling.seed": Whole(0, (1 << 32) - 1),
    "sampling.temp": Number(0.0, 10.0),
    "sampling.top_k": _TOKENS,
    "sampling.top_p": Number(0.0, 1.0),
    "sampling.typ_p": Number(0.0, 1.0),
    "sampling.xtc_probability": Number(0.0, 1.0),
    "sampling.xtc_threshold": Number(0.0, 1.0),
    # Embeddings
    "attention_type": Member(("causal", "non_causal"), "llama_attention_type", "LLAMA_ATTENTION_TYPE_"),
    "embd_normalize": Whole(-1, 32),  # -1 none, 0 largest, 1 sum, 2 Euclidean, else p-norm
    "pooling_type": Word(("auto", "mean", "cls", "last")),
    # The server
    "n_threads_http": Whole(1, 256),
    "sse_ping_interval": Whole(1, 3600),  # seconds
    "timeout_read": Whole(1, 86_400),  # seconds
    "timeout_write": Whole(1, 86_400),
    "verbosity": Whole(0, 5),  # from 4 on prompts are logged
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
    """Checked options as the server process sets them, by attribute path. {"enum", "member"} stands for a member of an
    enumeration, {"class", "arguments"} for an object of the library."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found.update(_MADE[name](value) if name in _MADE else {name: _attribute(OPTIONS[name], value)})
    if "draft_model" in values and "speculative" not in values:
        found.update(_speculations(["draft_simple"]))
    return found


def _attribute(option: Option, value: Any) -> Any:
    if isinstance(option, Member):
        return _member(option.enum, option.prefix + str(value).upper())
    return float(value) if isinstance(option, Number) else value


def _member(enum: str, member: str) -> dict[str, str]:
    return {"enum": enum, "member": member}


def _for_both(attribute: str, value: Any) -> dict[str, Any]:
    """Threads that generate and threads that read prompts have settings of their own; ours are for both."""
    return {f"cpuparams.{attribute}": value, f"cpuparams_batch.{attribute}": value}


def _cpus(text: str) -> dict[str, Any]:
    chosen = set(cpu_numbers(text))
    return _for_both("cpumask", [number in chosen for number in range(MAX_CPUS)]) | _for_both("mask_valid", True)


def _lora(adapters: list[dict[str, Any]]) -> dict[str, Any]:
    made = [{"class": "CommonAdapterLoraInfo", "arguments": [one["path"], float(one.get("scale", 1.0))]} for one in adapters]
    return {"lora_adapters": made}


def _grammar(text: str) -> dict[str, Any]:
    kind = _member("common_grammar_type", "COMMON_GRAMMAR_TYPE_USER")
    return {"sampling.grammar": {"class": "CommonGrammar", "arguments": [kind, text]}}


def _speculations(words: list[str]) -> dict[str, Any]:
    return {
        "speculative.types": [_member("common_speculative_type", f"COMMON_SPECULATIVE_TYPE_{word.upper()}") for word in words]
    }


def _renamed(attribute: str, option: Option) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {attribute: _attribute(option, value)}


# Settings that are not simply one attribute of the same name.
_MADE: dict[str, Callable[[Any], dict[str, Any]]] = {
    "chat_template_kwargs": lambda table: {"default_template_kwargs": {name: json.dumps(one) for name, one in table.items()}},
    "cpus": _cpus,
    "draft_cache_type_k": _renamed("speculative.draft.cache_type_k", _CACHE_TYPE),
    "draft_cache_type_v": _renamed("speculative.draft.cache_type_v", _CACHE_TYPE),
    "draft_gpu_layers": _renamed("speculative.draft.n_gpu_layers", OPTIONS["draft_gpu_layers"]),
    "draft_model": _renamed("speculative.draft.mparams.path", OPTIONS["draft_model"]),
    "draft_n_max": _renamed("speculative.draft.n_max", OPTIONS["draft_n_max"]),
    "draft_n_min": _renamed("speculative.draft.n_min", OPTIONS["draft_n_min"]),
    "draft_p_min": _renamed("speculative.draft.p_min", OPTIONS["draft_p_min"]),
    "lora": _lora,
    "mmproj": _renamed("mmproj.path", OPTIONS["mmproj"]),
    "poll": lambda level: _for_both("poll", level),
    "priority": lambda word: _for_both("priority", _attribute(OPTIONS["priority"], word)),
    "reasoning": lambda word: {"enable_reasoning": {"auto": -1, "off": 0, "on": 1}[word]},
    "reasoning_budget": _renamed("sampling.reasoning_budget_tokens", OPTIONS["reasoning_budget"]),
    "reasoning_budget_message": _renamed("sampling.reasoning_budget_message", OPTIONS["reasoning_budget_message"]),
    "sampling.grammar": _grammar,
    "sampling.samplers": lambda words: {"sampling.samplers": ";".join(words)},
    "speculative": _speculations,
    "strict_cpu": lambda on: _for_both("strict_cpu", on),
    # The library wants a share for every GPU there could be.
    "tensor_split": lambda shares: {"tensor_split": [*map(float, shares), *[0.0] * (MAX_GPUS - len(shares))]},
}
