"""A writer of GGUF files for tests: real headers by the format's specification, weights of zeros that take no room (sparse)."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from models_app.engines.gguf_format import BLOCKS, MAGIC

F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8
_FILE_TYPES = {F32: 0, F16: 1, Q4_0: 2, Q8_0: 7}
ALIGNMENT = 32
_U32, _F32, _BOOL, _STRING, _ARRAY, _U64 = 4, 6, 7, 8, 9, 10

Scalar = bool | int | float | str
Values = Mapping[str, Scalar | Sequence[Scalar]]
Tensors = Mapping[str, tuple[tuple[int, ...], int]]  # name: (shape, type)


def text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _kind(value: Scalar) -> int:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, str):
        return _STRING
    if isinstance(value, float):
        return _F32
    return _U32 if value < 1 << 32 else _U64


def _scalar(value: Scalar, kind: int) -> bytes:
    if isinstance(value, str):
        return text(value)
    return struct.pack({_BOOL: "<?", _F32: "<f", _U32: "<I", _U64: "<Q"}[kind], value)


def _value(value: Scalar | Sequence[Scalar]) -> bytes:
    if isinstance(value, bool | int | float | str):
        return struct.pack("<I", _kind(value)) + _scalar(value, _kind(value))
    kind = _kind(value[0])
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(_scalar(one, kind) for one in value)


def tensor_bytes(shape: tuple[int, ...], kind: int) -> int:
    elements = 1
    for side in shape:
        elements *= side
    per, size = BLOCKS[kind]
    return -(-elements // per) * size


def header(values: Values, tensors: Tensors, version: int = 3) -> bytes:
    """The header, padded up to where the weights begin."""
    out = MAGIC + struct.pack("<IQQ", version, len(tensors), len(values))
    for key, value in values.items():
        out += text(key) + _value(value)
    offset = 0
    for name, (shape, kind) in tensors.items():
        out += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        out += struct.pack("<IQ", kind, offset)
        offset += -(-tensor_bytes(shape, kind) // ALIGNMENT) * ALIGNMENT
    return out + bytes(-len(out) % ALIGNMENT)


def write(path: Path, values: Values, tensors: Tensors) -> Path:
    """A whole file."""
    start = header(values, tensors)
    sizes = [-(-tensor_bytes(shape, kind) // ALIGNMENT) * ALIGNMENT for shape, kind in tensors.values()]
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + sum(sizes))
    return path


def llama(
    path: Path, layers: int = 2, embedding: int = 64, vocabulary: int = 256, kind: int = F16, **more: Scalar | Sequence[Scalar]
) -> Path:
    """A small model of the architecture llama with the tensors that one has; more: further values of its architecture."""
    values: dict[str, Scalar | Sequence[Scalar]] = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": path.stem,
        "general.file_type": _FILE_TYPES[kind],
        "llama.block_count": layers,
        "llama.context_length": 4096,
        "llama.embedding_length": embedding,
        "llama.feed_forward_length": 4 * embedding,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 4,
        "tokenizer.ggml.tokens": [f"<{number}>" for number in range(vocabulary)],
        **{f"llama.{key.replace('__', '.')}": value for key, value in more.items()},
    }
    return write(path, values, llama_tensors(layers, embedding, vocabulary, kind))


def llama_tensors(layers: int, embedding: int, vocabulary: int, kind: int) -> Tensors:
    tensors = {"token_embd.weight": ((embedding, vocabulary), kind), "output_norm.weight": ((embedding,), F32)}
    for layer in range(layers):
        tensors[f"blk.{layer}.attn_q.weight"] = ((embedding, embedding), kind)
        tensors[f"blk.{layer}.attn_k.weight"] = ((embedding, embedding // 2), kind)
        tensors[f"blk.{layer}.attn_v.weight"] = ((embedding, embedding // 2), kind)
        tensors[f"blk.{layer}.ffn_up.weight"] = ((embedding, 4 * embedding), kind)
        tensors[f"blk.{layer}.attn_norm.weight"] = ((embedding,), F32)
    return tensors
