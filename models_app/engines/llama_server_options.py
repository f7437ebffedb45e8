"""The allow-list of the engine llama-server: how each setting is said with the flags of the binary at hand. Pure.

A setting that the embedded engine has too bears the same name and takes the same values here, so that a model can change
engines. Flags change their spelling from release to release: the first that the binary knows is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from models_app.engines import embedded_options
from models_app.engines.options import Option, Switch, Text, Whole, Word, cpu_numbers
from models_app.exceptions import PreflightError


class Flags(Protocol):
    """What a binary knows."""

    def spelling(self, *names: str) -> str | None:
        """The first of these flags that it knows."""


@dataclass(frozen=True, slots=True)
class Valued:
    """--flag value. words: those the flag spells otherwise; one spelled "" is what the binary does anyway."""

    names: tuple[str, ...]
    words: Mapping[str, str] = field(default_factory=dict)
    text: Callable[[Any], str] = str

    def argv(self, name: str, value: Any, flags: Flags) -> list[str]:
        said = self.words.get(value, self.text(value)) if isinstance(value, str) else self.text(value)
        return [_spelled(name, flags, self.names), said] if said else []


@dataclass(frozen=True, slots=True)
class Toggled:
    """One flag for true and one for false; none of either is what the binary does anyway."""

    on: tuple[str, ...] = ()
    off: tuple[str, ...] = ()

    def argv(self, name: str, value: Any, flags: Flags) -> list[str]:
        names = self.on if value else self.off
        return [_spelled(name, flags, names)] if names else []


_LOAD_MODES = {"mmap_mlock": "mmap+mlock", "direct_io": "dio"}
_LOAD_SWITCHES = {
    "auto": [],
    "mmap": [],
    "none": ["--no-mmap"],
    "mlock": ["--no-mmap", "--mlock"],
    "mmap_mlock": ["--mlock"],
    "direct_io": ["--direct-io"],
}


class LoadMode:
    """Older binaries have switches in place of --load-mode."""

    def argv(self, name: str, value: Any, flags: Flags) -> list[str]:
        if flag := flags.spelling("--load-mode"):
            return [flag, _LOAD_MODES.get(value, value)]
        return [_spelled(name, flags, (switch,)) for switch in _LOAD_SWITCHES[value]]


class LoraFiles:
    """--lora a,b where all count fully, else --lora-scaled a:0.5,b:1."""

    def argv(self, name: str, value: Any, flags: Flags) -> list[str]:
        paths, scales = [one["path"] for one in value], [one.get("scale", 1.0) for one in value]
        if any(letter in path for path in paths for letter in ",:"):
            raise PreflightError(f"extra_args: “{name}”: llama-server takes no path with a comma or colon; rename the file.")
        if all(scale == 1 for scale in scales):
            return [_spelled(name, flags, ("--lora",)), ",".join(paths)]
        pairs = (f"{path}:{scale:g}" for path, scale in zip(paths, scales, strict=True))
        return [_spelled(name, flags, ("--lora-scaled",)), ",".join(pairs)]


Said = Valued | Toggled | LoadMode | LoraFiles


def _spelled(name: str, flags: Flags, names: tuple[str, ...]) -> str:
    found = flags.spelling(*names)
    if found is None:
        raise PreflightError(
            f"extra_args: “{name}” needs {names[0]}, which this llama-server does not know; remove it or install a newer one."
        )
    return found


def _mask(text: str) -> str:
    """Processors as the hexadecimal number whose bits they are."""
    return f"{sum(1 << number for number in cpu_numbers(text)):x}"


def _shares(values: list[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _dashed(words: list[str]) -> str:
    return ",".join(word.replace("_", "-") for word in words)


# What the embedded engine has no parameter for.
OWN: dict[str, Option] = {
    "cpu_moe": Switch(),
    "devices": Text(200, r"[A-Za-z0-9_.:,]+", "a list of devices such as CUDA0,CUDA1 (llama-server --list-devices tells them)"),
    "n_cpu_moe": Whole(0, 1000),
    "override_tensor": Text(1000, r"[^\s\x00]+", "a list of pattern=buffer"),
    "rope_scaling_type": Word(("none", "linear", "yarn")),
}

_FLASH = {"disabled": "off", "enabled": "on"}
_PRIORITY = {"low": "-1", "normal": "0", "medium": "1", "high": "2"}

SAID: dict[str, Said] = {
    "cache_idle_slots": Toggled(("--cache-idle-slots",), ("--no-cache-idle-slots",)),
    "cache_prompt": Toggled(("--cache-prompt",), ("--no-cache-prompt",)),
    "cache_ram_mib": Valued(("--cache-ram",)),
    "cache_type_k": Valued(("--cache-type-k",)),
    "cache_type_v": Valued(("--cache-type-v",)),
    "check_tensors": Toggled(("--check-tensors",)),
    "checkpoint_min_step": Valued(("--checkpoint-min-step",)),
    "cont_batching": Toggled(("--cont-batching",), ("--no-cont-batching",)),
    "ctx_shift": Toggled(("--context-shift",), ("--no-context-shift",)),
    "flash_attn_type": Valued(("--flash-attn",), _FLASH),
    "kv_unified": Toggled(("--kv-unified",), ("--no-kv-unified",)),
    "load_mode": LoadMode(),
    "n_cache_reuse": Valued(("--cache-reuse",)),
    "n_ctx_checkpoints": Valued(("--ctx-checkpoints", "--swa-checkpoints")),
    "n_keep": Valued(("--keep",)),
    "n_predict": Valued(("--n-predict", "--predict")),
    "n_ubatch": Valued(("--ubatch-size",)),
    "slot_prompt_similarity": Valued(("--slot-prompt-similarity",)),
    "swa_full": Toggled(("--swa-full",)),
    "warmup": Toggled(("--warmup",), ("--no-warmup",)),
    "cpu_moe": Toggled(("--cpu-moe",)),
    "cpus": Valued(("--cpu-mask",), text=_mask),
    "devices": Valued(("--device",)),
    "main_gpu": Valued(("--main-gpu",)),
    "n_cpu_moe": Valued(("--n-cpu-moe",)),
    "no_extra_bufts": Toggled(("--no-repack",), ("--repack",)),
    "no_host": Toggled(("--no-host",)),
    "no_kv_offload": Toggled(("--no-kv-offload",), ("--kv-offload",)),
    "no_op_offload": Toggled(("--no-op-offload",), ("--op-offload",)),
    "no_perf": Toggled(("--no-perf",), ("--perf",)),
    "numa": Valued(("--numa",), {"disabled": ""}),
    "override_tensor": Valued(("--override-tensor",)),
    "poll": Valued(("--poll",)),
    "priority": Valued(("--prio",), _PRIORITY),
    "split_mode": Valued(("--split-mode",)),
    "strict_cpu": Valued(("--cpu-strict",), text=lambda on: str(int(on))),
    "tensor_split": Valued(("--tensor-split",), text=_shares),
    "rope_freq_base": Valued(("--rope-freq-base",)),
    "rope_freq_scale": Valued(("--rope-freq-scale",)),
    "rope_scaling_type": Valued(("--rope-scaling",)),
    "yarn_attn_factor": Valued(("--yarn-attn-factor",)),
    "yarn_beta_fast": Valued(("--yarn-beta-fast",)),
    "yarn_beta_slow": Valued(("--yarn-beta-slow",)),
    "yarn_ext_factor": Valued(("--yarn-ext-factor",)),
    "yarn_orig_ctx": Valued(("--yarn-orig-ctx",)),
    "image_max_tokens": Valued(("--image-max-tokens",)),
    "image_min_tokens": Valued(("--image-min-tokens",)),
    "lora": LoraFiles(),
    "lora_init_without_apply": Toggled(("--lora-init-without-apply",)),
    "mmproj": Valued(("--mmproj",)),
    "mmproj_use_gpu": Toggled(("--mmproj-offload",), ("--no-mmproj-offload",)),
    "draft_cache_type_k": Valued(("--spec-draft-type-k", "--cache-type-k-draft")),
    "draft_cache_type_v": Valued(("--spec-draft-type-v", "--cache-type-v-draft")),
    "draft_gpu_layers": Valued(("--spec-draft-ngl", "--gpu-layers-draft")),
    "draft_model": Valued(("--spec-draft-model", "--model-draft")),
    "draft_n_max": Valued(("--spec-draft-n-max", "--draft-max")),
    "draft_n_min": Valued(("--spec-draft-n-min", "--draft-min")),
    "draft_p_min": Valued(("--spec-draft-p-min", "--draft-p-min")),
    "speculative": Valued(("--spec-type",), text=_dashed),
    "chat_template_kwargs": Valued(("--chat-template-kwargs",), text=json.dumps),
    "force_pure_content_parser": Toggled(("--skip-chat-parsing",), ("--no-skip-chat-parsing",)),
    "prefill_assistant": Toggled(("--prefill-assistant",), ("--no-prefill-assistant",)),
    "reasoning": Valued(("--reasoning",)),
    "reasoning_budget": Valued(("--reasoning-budget",)),
    "reasoning_budget_message": Valued(("--reasoning-budget-message",)),
    "reasoning_format": Valued(("--reasoning-format",), {"deepseek_legacy": "deepseek-legacy"}),
    "special": Toggled(("--special",)),
    "sampling.adaptive_decay": Valued(("--adaptive-decay",)),
    "sampling.adaptive_target": Valued(("--adaptive-target",)),
    "sampling.dry_allowed_length": Valued(("--dry-allowed-length",)),
    "sampling.dry_base": Valued(("--dry-base",)),
    "sampling.dry_multiplier": Valued(("--dry-multiplier",)),
    "sampling.dry_penalty_last_n": Valued(("--dry-penalty-last-n",)),
    "sampling.dynatemp_exponent": Valued(("--dynatemp-exp",)),
    "sampling.dynatemp_range": Valued(("--dynatemp-range",)),
    "sampling.grammar": Valued(("--grammar",)),
    "sampling.ignore_eos": Toggled(("--ignore-eos",)),
    "sampling.min_p": Valued(("--min-p",)),
    "sampling.mirostat": Valued(("--mirostat",)),
    "sampling.mirostat_eta": Valued(("--mirostat-lr",)),
    "sampling.mirostat_tau": Valued(("--mirostat-ent",)),
    "sampling.penalty_freq": Valued(("--frequency-penalty",)),
    "sampling.penalty_last_n": Valued(("--repeat-last-n",)),
    "sampling.penalty_present": Valued(("--presence-penalty",)),
    "sampling.penalty_repeat": Valued(("--repeat-penalty",)),
    "sampling.samplers": Valued(("--samplers",), text=";".join),
    "sampling.seed": Valued(("--seed",)),
    "sampling.temp": Valued(("--temp",)),
    "sampling.top_k": Valued(("--top-k",)),
    "sampling.top_p": Valued(("--top-p",)),
    "sampling.typ_p": Valued(("--typical-p", "--typical")),
    "sampling.xtc_probability": Valued(("--xtc-probability",)),
    "sampling.xtc_threshold": Valued(("--xtc-threshold",)),
    "embd_normalize": Valued(("--embd-normalize",)),
    "n_threads_http": Valued(("--threads-http",)),
    "sse_ping_interval": Valued(("--sse-ping-interval",)),
    "timeout_read": Valued(("--timeout",)),
    "verbosity": Valued(("--log-verbosity", "--verbosity")),
}

OPTIONS: dict[str, Option] = {
    "pooling_type": embedded_options.OPTIONS["pooling_type"],
    **{name: OWN.get(name) or embedded_options.OPTIONS[name] for name in SAID},
}


def as_argv(values: Mapping[str, Any], flags: Flags) -> list[str]:
    """Checked settings as flags. Raises PreflightError where the binary has none for one of them."""
    if "draft_model" in values and "speculative" not in values and flags.spelling("--spec-type"):
        values = {**values, "speculative": ["draft_simple"]}
    return [word for name, value in values.items() for word in SAID[name].argv(name, value, flags)]
