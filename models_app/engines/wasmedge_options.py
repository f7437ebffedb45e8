"""The wasmedge engine's allow-list of extra_args and its prompt templates. Pure.

Listen address, key, log, web page and directory mapping are not here, so they are refused like any unknown name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models_app.engines.options import File, Number, Option, Shares, Switch, Text, Whole, Word, check
from models_app.exceptions import PreflightError

# Names are those of llama-api-server's flags; embedding_… and …_path are our own words for what its lists and tables hold.
OPTIONS: dict[str, Option] = {
    "codec_model_path": File(),  # speech: the model that turns codes into sound
    "embedding_batch_size": Whole(1, 1 << 20),
    "embedding_ctx_size": Whole(64, 1 << 24),
    "frequency_penalty": Number(-2.0, 2.0),
    "grammar": Text(8192),
    "include_usage": Switch(),
    "json_schema": Text(8192, means="a JSON schema as text"),
    "main_gpu": Whole(0, 127),
    "mmproj_path": File(),  # vision: the multimodal projector
    "n_predict": Whole(-2, 1 << 20),
    "no_mmap": Switch(),
    "presence_penalty": Number(-2.0, 2.0),
    "repeat_penalty": Number(0.0, 10.0),
    "reverse_prompt": Text(256),
    "speaker_path": File(),  # speech: whose voice
    "split_mode": Word(("none", "layer", "row")),
    "temp": Number(0.0, 10.0),
    "tensor_split": Shares(128),
    "top_p": Number(0.0, 1.0),
    "ubatch_size": Whole(1, 1 << 20),
}

# What llama-api-server can turn into a chat prompt. Its further names “embedding”, “tts” and “none” are no chat templates.
TEMPLATES = frozenset({
    "baichuan-2", "chatml", "chatml-think", "chatml-tool", "codellama-instruct", "codellama-super-instruct", "deepseek-chat",
    "deepseek-chat-2", "deepseek-chat-25", "deepseek-chat-3", "deepseek-coder", "exaone-chat", "exaone-deep-chat", "falcon3",
    "functionary-31", "functionary-32", "gemma-3", "gemma-instruct", "glm-4-chat", "gpt-oss", "groq-llama3-tool",
    "human-assistant", "intel-neural", "internlm-2-tool", "llama-2-chat", "llama-3-chat", "llama-3-tool", "llama-4-chat",
    "mediatek-breeze", "megrez", "minicpmv", "mistral-instruct", "mistral-small-chat", "mistral-small-tool", "mistral-tool",
    "mistrallite", "moxin-chat", "moxin-instruct", "nemotron-chat", "nemotron-tool", "octopus", "openchat", "phi-2-chat",
    "phi-2-instruct", "phi-3-chat", "phi-3-instruct", "phi-4-chat", "qwen2-vision", "qwen3-agent", "qwen3-no-think",
    "seed-instruct", "seed-oss-no-think", "seed-oss-think", "seed-reasoning", "smol-vision", "smol3-no-think", "solar-instruct",
    "stablelm-zephyr", "vicuna-1.0-chat", "vicuna-1.1-chat", "vicuna-llava", "wizard-coder", "zephyr",
})  # fmt: skip


def check_options(values: Mapping[str, Any]) -> None:
    """Raise PreflightError naming the first option that is refused, unknown or out of range, and what is allowed."""
    check(OPTIONS, values)


def check_template(name: str) -> None:
    """Raise PreflightError unless it names a chat template; there is none in a GGUF file that this engine would use."""
    if name in TEMPLATES:
        return
    known = ", ".join(sorted(TEMPLATES))
    if name:
        raise PreflightError(f"prompt_template “{name}” is not known to the wasmedge engine; choose one of: {known}.")
    raise PreflightError(f"The wasmedge engine needs prompt_template for a chat model; choose one of: {known}.")
