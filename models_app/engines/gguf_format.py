"""The GGUF file format, as far as its header goes. The weights are never read.

Source: the format's specification (ggml/docs/gguf.md) and gguf.cpp of llama.cpp. A file is untrusted input: every count and
length is bounded before it is used, and what is kept of a header is bounded as a whole. Files are read, not mapped: one that
is cut short meanwhile must not end this process with SIGBUS.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from itertools import pairwise
from typing import BinaryIO

MAGIC = b"GGUF"
LITTLE_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

MAX_HEADER_BYTES = 128 << 20  # real ones with 260,000 tokens and their merges take 15 MiB
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 4
MAX_NUMBER = 1 << 60  # of a dimension's product or an offset
KEPT_TEXT = 1024  # characters; longer ones are cut
KEPT_VALUES = 1 << 16  # in all arrays together; an array of more than KEPT_ARRAY is only counted
KEPT_ARRAY = 4096
_CHUNK = 1 << 18

# (elements, bytes) of one block of each tensor type: GGML_QUANT_SIZES in gguf-py/gguf/constants.py.
BLOCKS: dict[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66),
    39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip

# Scalar value types by their number: the format of struct, little-endian.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING = 8
_ARRAY = 9

Scalar = int | float | bool | str
Value = Scalar | tuple[Scalar, ...]


class HeaderCut(Exception):
    """The file ends inside its header."""


class HeaderWrong(Exception):
    """The header contradicts the format; str() says where."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of the tensor table; bytes is None where the type is one this module does not know."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int  # within the tensor data
    bytes: int | None

    @property
    def layer(self) -> int:
        """The number in blk.<number>.…; -1 where it belongs to none."""
        kind, _, rest = self.name.partition(".")
        number = rest.partition(".")[0]
        return int(number) if kind == "blk" and number.isdecimal() and len(number) < 6 else -1


@dataclass(slots=True)
class RawHeader:
    """What stands in one file before its weights."""

    version: int
    values: dict[str, Value] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)  # of every array, kept or not
    tensors: list[Tensor] = field(default_factory=list)
    data_start: int = 0

    def data_end(self) -> int:
        """Where the last tensor ends, at least: one of an unknown type counts from its offset alone."""
        return self.data_start + max((one.offset + (one.bytes or 0) for one in self.tensors), default=0)


class _Reader:
    """Forward reading with a bound on the sum of all."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._buffer = b""
        self._at = 0
        self._dropped = 0  # bytes before the buffer

    @property
    def position(self) -> int:
        return self._dropped + self._at

    def _need(self, count: int) -> None:
        """Have so many bytes in the buffer from here on."""
        missing = self._at + count - len(self._buffer)
        if missing <= 0:
            return
        if self.position + count > MAX_HEADER_BYTES:
            raise HeaderWrong(f"its header is larger than {MAX_HEADER_BYTES >> 20} MiB")
        more = self._file.read(max(missing, _CHUNK))
        self._buffer = self._buffer[self._at :] + more
        self._dropped += self._at
        self._at = 0
        if len(self._buffer) < count:
            raise HeaderCut

    def take(self, count: int) -> bytes:
        self._need(count)
        start = self._at
        self._at += count
        return self._buffer[start : self._at]

    def number(self, form: str) -> int | float | bool:
        size = struct.calcsize(form)
        self._need(size)
        (value,) = struct.unpack_from(form, self._buffer, self._at)
        self._at += size
        return value  # type: ignore[no-any-return]

    def count(self, form: str, most: int, what: str) -> int:
        value = int(self.number(form))
        if value > most:
            raise HeaderWrong(f"it claims {value} {what}")
        return value

    def skip(self, count: int) -> None:
        """Go on by count bytes, in steps no larger than a chunk."""
        if self.position + count > MAX_HEADER_BYTES:
            raise HeaderWrong(f"its header is larger than {MAX_HEADER_BYTES >> 20} MiB")
        while count:
            step = min(count, _CHUNK)
            self._need(step)
            self._at += step
            count -= step

    def text(self) -> str:
        length = self.count("<Q", MAX_HEADER_BYTES, "bytes of text")
        kept = self.take(min(length, KEPT_TEXT))
        self.skip(length - len(kept))
        return kept.decode("utf-8", "replace")

    def skip_texts(self, count: int) -> None:
        """Vocabularies hold hundreds of thousands: as little as possible is done for each."""
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if self._at + 8 > len(self._buffer):
                self._need(8)
            (length,) = unpack(self._buffer, self._at)
            self._at += 8
            if self._at + length <= len(self._buffer):
                self._at += length
            else:
                self.skip(length)


def read(file: BinaryIO) -> RawHeader:
    """The header of a file that begins with MAGIC. Raises HeaderCut or HeaderWrong."""
    reader = _Reader(file)
    if reader.take(len(MAGIC)) != MAGIC:
        raise HeaderWrong("it does not begin with GGUF")
    version = int(reader.number("<I"))
    if version not in LITTLE_VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
        if swapped in LITTLE_VERSIONS:
            raise HeaderWrong("it is made for big-endian machines")
        raise HeaderWrong(f"its format version is {version}")
    header = RawHeader(version)
    tensors = reader.count("<Q", MAX_TENSORS, "tensors")
    keys = reader.count("<Q", MAX_KEYS, "settings")
    _read_values(reader, header, keys)
    header.tensors = [_read_tensor(reader) for _ in range(tensors)]
    header.data_start = _aligned(reader.position, header.values.get("general.alignment", DEFAULT_ALIGNMENT))
    _size_unknown(header)
    return header


def _read_values(reader: _Reader, header: RawHeader, keys: int) -> None:
    budget = KEPT_VALUES
    for _ in range(keys):
        key = reader.text()
        kind = int(reader.number("<I"))
        if kind != _ARRAY:
            header.values[key] = _scalar(reader, kind)
            continue
        kind = int(reader.number("<I"))
        length = reader.count("<Q", MAX_HEADER_BYTES, "values of one setting")
        header.lengths[key] = length
        if length <= min(KEPT_ARRAY, budget) and kind in _SCALARS:
            budget -= length
            header.values[key] = tuple(_scalar(reader, kind) for _ in range(length))
        else:
            _skip_array(reader, kind, length)


def _scalar(reader: _Reader, kind: int) -> Scalar:
    if kind == _STRING:
        return reader.text()
    form = _SCALARS.get(kind)
    if form is None:
        raise HeaderWrong(f"it holds a setting of the unknown type {kind}")
    return reader.number(form)


def _skip_array(reader: _Reader, kind: int, length: int) -> None:
    if kind == _STRING:
        reader.skip_texts(length)
    elif kind in _SCALARS:
        reader.skip(length * struct.calcsize(_SCALARS[kind]))
    else:
        raise HeaderWrong(f"it holds a list of the unknown type {kind}")


def _read_tensor(reader: _Reader) -> Tensor:
    name = reader.text()
    dimensions = reader.count("<I", MAX_DIMENSIONS, "dimensions of one tensor")
    shape = tuple(int(reader.number("<Q")) for _ in range(dimensions))
    kind = int(reader.number("<I"))
    offset = int(reader.number("<Q"))
    elements = math.prod(shape)
    if elements > MAX_NUMBER or offset > MAX_NUMBER:
        raise HeaderWrong(f"its tensor {name[:64]!r} is impossibly large")
    block = BLOCKS.get(kind)
    return Tensor(name, shape, kind, offset, None if block is None else -(-elements // block[0]) * block[1])


def _size_unknown(header: RawHeader) -> None:
    """A tensor of a newer type reaches to the next one; the last of the file stays unknown."""
    if all(one.bytes is not None for one in header.tensors):
        return
    ordered = sorted(header.tensors, key=lambda one: one.offset)
    following: dict[str, int] = {one.name: after.offset - one.offset for one, after in pairwise(ordered)}
    header.tensors = [
        one if one.bytes is not None else Tensor(one.name, one.shape, one.type, one.offset, following.get(one.name))
        for one in header.tensors
    ]


def _aligned(position: int, alignment: object) -> int:
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise HeaderWrong(f"its alignment is {alignment!r}")
    return -(-position // alignment) * alignment
