"""A BERT of sentence-transformers (config.json, tokenizer.json, model.safetensors in a zip) written as a GGUF model.

Names and keys are those of llama.cpp's converter. Weights are copied byte by byte: both formats hold 32-bit floats by rows.
"""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

from tests.fakes.gguf_files import ALIGNMENT, F32, Scalar, header

MEAN = 1  # llama_pooling_type
CHUNK = 1 << 20

_TOP = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
_IN_LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def convert(archive: Path, target: Path) -> Path:
    """Write the model; its name appears only once it is whole."""
    part = target.with_suffix(".part")
    with zipfile.ZipFile(archive) as files, files.open("model.safetensors") as weights, part.open("wb") as out:
        (length,) = struct.unpack("<Q", weights.read(8))
        found = json.loads(weights.read(length))
        start = 8 + length
        tensors = {ours: found[theirs] for theirs in found if (ours := our_name(theirs))}
        shapes = {ours: (tuple(reversed(tensor["shape"])), F32) for ours, tensor in tensors.items()}
        out.write(header(values(files), shapes))
        for tensor in tensors.values():
            begin, end = tensor["data_offsets"]
            weights.seek(start + begin)
            copy(weights, out, end - begin)
    part.rename(target)
    return target


def our_name(theirs: str) -> str:
    """A tensor's name in the GGUF file; empty for what inference does not need."""
    *path, kind = theirs.split(".")
    if path[:2] == ["encoder", "layer"]:
        inside = _IN_LAYER.get(".".join(path[3:]))
        return f"blk.{path[2]}.{inside}.{kind}" if inside else ""
    outside = _TOP.get(".".join(path))
    return f"{outside}.{kind}" if outside else ""


def values(files: zipfile.ZipFile) -> dict[str, Scalar | list[Scalar]]:
    config: dict[str, Any] = json.loads(files.read("config.json"))
    vocabulary: dict[str, int] = json.loads(files.read("tokenizer.json"))["model"]["vocab"]
    return {
        "general.architecture": "bert",
        "general.type": "model",
        "general.name": "MiniLM",
        "general.file_type": 0,
        "bert.block_count": config["num_hidden_layers"],
        "bert.context_length": config["max_position_embeddings"],
        "bert.embedding_length": config["hidden_size"],
        "bert.feed_forward_length": config["intermediate_size"],
        "bert.attention.head_count": config["num_attention_heads"],
        "bert.attention.layer_norm_epsilon": float(config["layer_norm_eps"]),
        "bert.attention.causal": False,
        "bert.pooling_type": MEAN,
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "jina-v2-en",
        "tokenizer.ggml.tokens": [word_of(token) for token in sorted(vocabulary, key=vocabulary.__getitem__)],
        "tokenizer.ggml.token_type_count": config["type_vocab_size"],
        "tokenizer.ggml.bos_token_id": vocabulary["[CLS]"],
        "tokenizer.ggml.cls_token_id": vocabulary["[CLS]"],
        "tokenizer.ggml.seperator_token_id": vocabulary["[SEP]"],
        "tokenizer.ggml.padding_token_id": vocabulary["[PAD]"],
        "tokenizer.ggml.unknown_token_id": vocabulary["[UNK]"],
        "tokenizer.ggml.mask_token_id": vocabulary["[MASK]"],
    }


def word_of(token: str) -> str:
    """A word piece as llama.cpp wants it: not marked as a continuation, but as the beginning of a word."""
    if token.startswith("[") and token.endswith("]"):
        return token
    return token[2:] if token.startswith("##") else "\u2581" + token


def copy(source: IO[bytes], out: IO[bytes], length: int) -> None:
    """So many bytes, padded to the format's alignment."""
    left = length
    while left:
        chunk = source.read(min(left, CHUNK))
        out.write(chunk)
        left -= len(chunk)
    out.write(bytes(-length % ALIGNMENT))
