"""What can be told of a GGUF model without loading it: whether it is one, whether it is whole, and its dimensions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from models_app.engines import gguf_format
from models_app.engines.gguf_format import MAGIC, HeaderCut, HeaderWrong, RawHeader, Tensor, Value
from models_app.exceptions import NotAModel, PreflightError, TruncatedModel

MAX_PARTS = 1024
MAX_LAYERS = 4096
_PART = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$", re.IGNORECASE)

# general.file_type: the quantisation most tensors have (enum llama_ftype).
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4", 39: "NVFP4", 40: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """One model, of one file or of several that belong together. 0, "" or () where the file does not say.

    Per layer: head_count, head_count_kv, feed_forward_length.
    """

    files: tuple[Path, ...]
    file_bytes: int  # of all files
    architecture: str
    kind: str  # general.type: "model", "adapter", "mmproj" …
    name: str
    size_label: str
    quantisation: str
    block_count: int
    embedding_length: int
    head_count: tuple[int, ...]
    head_count_kv: tuple[int, ...]
    key_length: int
    value_length: int
    feed_forward_length: tuple[int, ...]
    context_length: int  # trained
    vocab_size: int
    expert_count: int
    expert_used_count: int
    sliding_window: int
    pooling_type: int | None
    has_chat_template: bool
    values: dict[str, Value]  # everything scalar or short, by its full key
    tensors: tuple[Tensor, ...]

    @property
    def tensor_bytes(self) -> int:
        """All weights."""
        return sum(tensor.bytes or 0 for tensor in self.tensors)

    def block_bytes(self) -> dict[int, int]:
        """Weights by layer; what belongs to no layer (embedding, output) is not among them."""
        found: dict[int, int] = {}
        for tensor in self.tensors:
            if tensor.layer >= 0:
                found[tensor.layer] = found.get(tensor.layer, 0) + (tensor.bytes or 0)
        return found

    def number(self, key: str, default: int = 0) -> int:
        """The whole number under <architecture>.<key>."""
        return _whole(self.values.get(f"{self.architecture}.{key}"), default)


def check(path: Path) -> None:
    """Raise PreflightError unless this is a readable, whole GGUF file (or the first of several that are all there)."""
    read_header(path)


def read_header(path: Path) -> GgufHeader:
    """The model's header; kept until the file changes.

    Raises PreflightError where it cannot be read, NotAModel where it is something else, TruncatedModel where bytes are missing.
    """
    return _read_model(tuple((file, *_stamp(file)) for file in _files(path)))


def _files(path: Path) -> list[Path]:
    """The model's files in order; one alone, or all parts of which the first was given."""
    match = _PART.match(path.name)
    if match is None:
        return [path]
    number, count = int(match["number"]), int(match["count"])
    parts = [
        path.with_name(f"{match['stem']}-{one:05}-of-{count:05}{path.suffix}") for one in range(1, min(count, MAX_PARTS) + 1)
    ]
    if number != 1:
        raise PreflightError(f"{path} is part {number} of {count}; choose the first part, {parts[0].name}.")
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise TruncatedModel(f"{path} is one of {count} parts and {missing[0]} is missing; download it again.")
    return parts


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return stat.st_size, stat.st_mtime_ns


def _unreadable(path: Path, error: OSError) -> PreflightError:
    return PreflightError(f"{path} cannot be read ({error.strerror}); mend its permissions or choose another file.")


@lru_cache(maxsize=64)
def _read_model(files: tuple[tuple[Path, int, int], ...]) -> GgufHeader:
    """(path, size, time of last change in ns) each."""
    raws = [_read_whole(path, size) for path, size, _ in files]
    first = raws[0]
    tensors = tuple(tensor for raw in raws for tensor in raw.tensors)
    return _header(first, tuple(path for path, _, _ in files), sum(size for _, size, _ in files), tensors)


def _read_whole(path: Path, size: int) -> RawHeader:
    """One file's header, with its weights proven to be there."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
            _check_start(path, start)
            file.seek(0)
            raw = gguf_format.read(file)
    except OSError as error:
        raise _unreadable(path, error) from error
    except HeaderCut:
        raise TruncatedModel(
            f"{path} is truncated: it ends inside its header, after {size:,} bytes; download it again."
        ) from None
    except HeaderWrong as error:
        raise NotAModel(f"{path} is not a usable GGUF file: {error}; download it again or choose another file.") from None
    if raw.data_end() > size:
        raise TruncatedModel(f"{path} is truncated: has {size:,} of {raw.data_end():,} bytes; download it again.")
    return raw


def _check_start(path: Path, start: bytes) -> None:
    """Tell what people save by mistake from what is no model at all."""
    if start.startswith(MAGIC):
        return
    if not start:
        raise NotAModel(f"{path} is empty; download it again.")
    if start.lstrip().startswith((b"<", b"{")) or start.startswith(
        (b"Entry not found", b"Not Found", b"version https://git-lfs")
    ):
        raise NotAModel(f"{path} is a saved web answer, not a model; download it again from the right address.")
    raise NotAModel(f"{path} is not a GGUF file (it begins with {start[:4]!r}); choose a model in GGUF format.")


def _header(raw: RawHeader, files: tuple[Path, ...], file_bytes: int, tensors: tuple[Tensor, ...]) -> GgufHeader:
    values = raw.values
    architecture = _text(values.get("general.architecture"))

    def number(key: str, default: int = 0) -> int:
        return _whole(values.get(f"{architecture}.{key}"), default)

    layers = min(number("block_count"), MAX_LAYERS)

    def per_layer(key: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        return _per_layer(values.get(f"{architecture}.{key}"), layers) or default

    heads = per_layer("attention.head_count")
    most_heads = max(heads, default=0)
    embedding = number("embedding_length")
    head_length = embedding // most_heads if most_heads else 0
    pooling = values.get(f"{architecture}.pooling_type")
    return GgufHeader(
        files=files,
        file_bytes=file_bytes,
        architecture=architecture,
        kind=_text(values.get("general.type")),
        name=_text(values.get("general.name")),
        size_label=_text(values.get("general.size_label")),
        quantisation=FILE_TYPES.get(_whole(values.get("general.file_type"), -1), ""),
        block_count=layers,
        embedding_length=embedding,
        head_count=heads,
        head_count_kv=per_layer("attention.head_count_kv", heads),
        key_length=number("attention.key_length", head_length),
        value_length=number("attention.value_length", head_length),
        feed_forward_length=per_layer("feed_forward_length"),
        context_length=number("context_length"),
        vocab_size=_vocab_size(raw, number("vocab_size"), tensors),
        expert_count=number("expert_count"),
        expert_used_count=number("expert_used_count"),
        sliding_window=number("attention.sliding_window"),
        pooling_type=_whole(pooling, 0) if pooling is not None else None,
        has_chat_template="tokenizer.chat_template" in values,
        values=values,
        tensors=tensors,
    )


def _vocab_size(raw: RawHeader, said: int, tensors: tuple[Tensor, ...]) -> int:
    """Rows of the embedding, which is what the output layer computes; else the number of tokens."""
    rows = next((tensor.shape[1] for tensor in tensors if tensor.name == "token_embd.weight" and len(tensor.shape) > 1), 0)
    return rows or raw.lengths.get("tokenizer.ggml.tokens", 0) or said


def _per_layer(value: Value | None, layers: int) -> tuple[int, ...]:
    """A number for every layer, whether the file gives one for all or a list."""
    if isinstance(value, tuple):
        found = tuple(_whole(one, 0) for one in value[:layers])
        return found + (0,) * (layers - len(found))
    return (_whole(value, 0),) * layers if value is not None else ()


def _whole(value: object, default: int) -> int:
    """A number that is no size (negative, a fraction, text) counts as not given."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
