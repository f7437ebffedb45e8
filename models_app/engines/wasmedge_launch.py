"""How llama-api-server is started under WasmEdge: its command line, and its config file where speech is served. Pure.

    wasmedge --dir .:<runtime folder> --env LLAMA_LOG=warn --nn-preload <alias>:GGML:AUTO:<file> … <wasm> <flags>

Its lists hold exactly one value per model, chat first: with other counts it panics. Model files are opened by llama.cpp on
the host, so that the guest sees its runtime folder alone. A flag with a value that may begin with a dash is written in one
word, because the guest would take the value for a flag of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models_app.engines.base import ModelSpec

CONFIG = "llama-api-server.toml"
LOG_LEVEL = "warn"  # at info it logs prompts
MOST_THREADS = 8
ALL_LAYERS = 999  # it takes no negative number
ALIASES = {"chat": "default", "embedding": "embedding", "tts": "tts"}
UBATCH = 512

Value = str | int | float | bool
Table = dict[str, Value]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens: of one request, of a prompt's parts, and of those computed at once."""

    ctx: int
    batch: int
    ubatch: int


def models_of(model: ModelSpec) -> dict[str, Path]:
    """The files one process serves by kind, in the order of its lists."""
    paths = {"chat": model.chat_model_path, "embedding": model.embedding_model_path, "tts": model.tts_model_path}
    return {kind: path for kind, path in paths.items() if path is not None}


def arguments(model: ModelSpec, port: int, folder: Path, wasm: Path, trained_ctx: int | None) -> list[str]:
    """Everything after the program's name. trained_ctx: of the embedding model, None where that is not known."""
    kinds = models_of(model)
    preload = [f"{ALIASES[kind]}:GGML:AUTO:{path}" for kind, path in kinds.items()]
    return [
        "--dir", f".:{folder}",
        "--env", f"LLAMA_LOG={LOG_LEVEL}",
        *(word for value in preload for word in ("--nn-preload", value)),
        str(wasm),
        *(_config_flags(kinds) if "tts" in kinds else _flags(model, port, sizes(model, trained_ctx))),
    ]  # fmt: skip


def sizes(model: ModelSpec, trained_ctx: int | None) -> dict[str, Sizes]:
    """Of each kind. A text to embed must fit into one batch, and a context beyond the trained one ends the process."""
    extra = model.extra_args
    longest = min(model.ctx_size, trained_ctx or model.ctx_size)
    embedding_ctx = extra.get("embedding_ctx_size", longest)
    embedding_batch = extra.get("embedding_batch_size", embedding_ctx)
    ubatch = extra.get("ubatch_size", min(UBATCH, model.batch_size))
    return {
        "chat": Sizes(model.ctx_size, model.batch_size, ubatch),
        "embedding": Sizes(embedding_ctx, embedding_batch, embedding_batch),
        # A sentence's sound is generated in one go from one batch.
        "tts": Sizes(model.ctx_size, model.ctx_size, model.ctx_size),
    }


def threads(model: ModelSpec) -> int:
    return model.threads or min(MOST_THREADS, os.cpu_count() or 1)


def gpu_layers(model: ModelSpec) -> int:
    return ALL_LAYERS if model.gpu_layers < 0 else model.gpu_layers


# Chat, embeddings or both: flags


def _flags(model: ModelSpec, port: int, by_kind: Mapping[str, Sizes]) -> list[str]:
    kinds = models_of(model)
    template = {"chat": model.prompt_template, "embedding": "embedding"}

    def listed(values: Iterator[object]) -> str:
        return ",".join(map(str, values))

    return [
        "--model-name", listed(model.name for _ in kinds),
        "--model-alias", listed(ALIASES[kind] for kind in kinds),
        "--prompt-template", listed(template[kind] for kind in kinds),
        "--ctx-size", listed(by_kind[kind].ctx for kind in kinds),
        "--batch-size", listed(by_kind[kind].batch for kind in kinds),
        "--ubatch-size", listed(by_kind[kind].ubatch for kind in kinds),
        "--threads", str(threads(model)),
        "--n-gpu-layers", str(gpu_layers(model)),
        "--socket-addr", f"127.0.0.1:{port}",
        *_optional_flags(model.extra_args),
    ]  # fmt: skip


# By the name in extra_args. The rest of the allow-list stands in the lists above, or in the config file alone.
FLAGS = {
    "frequency_penalty": "--frequency-penalty",
    "grammar": "--grammar",
    "json_schema": "--json-schema",
    "main_gpu": "--main-gpu",
    "mmproj_path": "--llava-mmproj",
    "n_predict": "--n-predict",
    "no_mmap": "--no-mmap",
    "presence_penalty": "--presence-penalty",
    "repeat_penalty": "--repeat-penalty",
    "reverse_prompt": "--reverse-prompt",
    "split_mode": "--split-mode",
    "temp": "--temp",
    "tensor_split": "--tensor-split",
    "top_p": "--top-p",
}


def _optional_flags(extra: Mapping[str, Any]) -> list[str]:
    flags = [f"{flag}={_text(extra[name])}" for name, flag in FLAGS.items() if name in extra]
    return [*flags, "--include-usage"] if extra.get("include_usage") else flags


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(f"{part:g}" for part in value) if isinstance(value, list) else str(value)


# Speech, alone or with the others: a config file


def _config_flags(kinds: Mapping[str, Path]) -> list[str]:
    return ["config", "--file", CONFIG, *(f"--{kind}" for kind in kinds)]


def config_file(model: ModelSpec, port: int, trained_ctx: int | None) -> str:
    """TOML with all four tables and every key, as its parser demands, whatever is served."""
    by_kind = sizes(model, trained_ctx)
    tables: dict[str, Table] = {
        "server": {"socket_addr": f"127.0.0.1:{port}"},
        "chat": _chat_table(model, by_kind["chat"]),
        "embedding": {**_common(model, "embedding", by_kind["embedding"]), "prompt_template": "embedding", **_gpus(model)},
        "tts": _speech_table(model, by_kind["tts"]),
    }
    return "\n".join(line for name, table in tables.items() for line in (f"[{name}]", *_lines(table), ""))


def _common(model: ModelSpec, kind: str, size: Sizes) -> Table:
    return {
        "model_name": model.name,
        "model_alias": ALIASES[kind],
        "ctx_size": size.ctx,
        "batch_size": size.batch,
        "ubatch_size": size.ubatch,
    }


def _gpus(model: ModelSpec) -> Table:
    extra = model.extra_args
    table: Table = {"threads": threads(model), "split_mode": extra.get("split_mode", "layer")}
    if "main_gpu" in extra:
        table["main_gpu"] = extra["main_gpu"]
    if "tensor_split" in extra:
        table["tensor_split"] = _text(extra["tensor_split"])
    return table


def _chat_table(model: ModelSpec, size: Sizes) -> Table:
    extra = model.extra_args
    table: Table = {
        **_common(model, "chat", size),
        **_gpus(model),
        "prompt_template": model.prompt_template if model.chat_model_path else "none",
        "n_predict": extra.get("n_predict", -1),
        "n_gpu_layers": gpu_layers(model),
        "no_mmap": extra.get("no_mmap", False),
        "temp": float(extra.get("temp", 1.0)),
        "top_p": float(extra.get("top_p", 1.0)),
        "repeat_penalty": float(extra.get("repeat_penalty", 1.1)),
        "presence_penalty": float(extra.get("presence_penalty", 0.0)),
        "frequency_penalty": float(extra.get("frequency_penalty", 0.0)),
        "grammar": extra.get("grammar", ""),
        "json_schema": extra.get("json_schema", ""),
        "llava_mmproj": extra.get("mmproj_path", ""),
        "include_usage": extra.get("include_usage", False),
    }
    if "reverse_prompt" in extra:  # an empty one would end every answer at once
        table["reverse_prompt"] = extra["reverse_prompt"]
    return table


def _speech_table(model: ModelSpec, size: Sizes) -> Table:
    extra = model.extra_args
    return {
        **_common(model, "tts", size),
        "codec_model": extra.get("codec_model_path", ""),
        "speaker_file": extra.get("speaker_path", ""),
        "output_file": "output.wav",
        "n_predict": extra.get("n_predict", 4096),
        "n_gpu_layers": gpu_layers(model),
        "temp": float(extra.get("temp", 0.8)),
    }


def _lines(table: Table) -> Iterator[str]:
    for key, value in table.items():
        # JSON's text is TOML's, but for the one control character that JSON leaves as it is.
        yield f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
