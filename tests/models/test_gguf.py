"""Reading GGUF headers: the real demo model, files written for the test, and files that mean harm."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models_app.engines import gguf, gguf_format
from models_app.exceptions import NotAModel, PreflightError, TruncatedModel
from tests.fakes import gguf_files


def test_the_demo_model_is_read_as_what_it_is(demo_model: Path) -> None:
    header = gguf.read_header(demo_model)
    assert (header.architecture, header.kind, header.size_label, header.quantisation) == ("llama", "model", "135M", "Q4_1")
    assert (header.block_count, header.embedding_length, header.context_length) == (30, 576, 8192)
    assert header.head_count == (9,) * 30
    assert header.head_count_kv == (3,) * 30
    assert (header.key_length, header.value_length, header.vocab_size) == (64, 64, 49152)
    assert header.has_chat_template
    assert header.file_bytes == 98_362_432
    assert len(header.tensors) == 272
    assert 0 < header.file_bytes - header.tensor_bytes < 3_000_000  # all the rest is the header with its vocabulary
    assert set(header.block_bytes()) == set(range(30))


def test_a_written_model_comes_back(tmp_path: Path) -> None:
    file = gguf_files.llama(tmp_path / "small.gguf", layers=3, embedding=64, vocabulary=300, kind=gguf_files.Q8_0)
    header = gguf.read_header(file)
    assert (header.name, header.quantisation, header.block_count, header.vocab_size) == ("small", "Q8_0", 3, 300)
    assert (header.key_length, header.pooling_type, header.has_chat_template) == (8, None, False)
    assert header.block_bytes()[2] == gguf_files.tensor_bytes((64, 64 + 32 + 32 + 256), gguf_files.Q8_0) + 64 * 4


def test_what_differs_between_layers_is_kept_by_layer(tmp_path: Path) -> None:
    file = gguf_files.llama(
        tmp_path / "mixed.gguf", layers=3, attention__head_count_kv=[4, 0, 2], attention__key_length=16, pooling_type=2
    )
    header = gguf.read_header(file)
    assert header.head_count_kv == (4, 0, 2)
    assert (header.key_length, header.value_length, header.pooling_type) == (16, 8, 2)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = gguf_files.llama(tmp_path / "m.gguf", layers=1)
    assert gguf.read_header(file).block_count == 1
    gguf_files.llama(file, layers=2)
    assert gguf.read_header(file).block_count == 2


@pytest.mark.parametrize("keep", [0.3, 0.97])
def test_a_truncated_model_tells_how_much_is_missing(tmp_path: Path, keep: float) -> None:
    file = gguf_files.llama(tmp_path / "m.gguf")
    whole = file.stat().st_size
    os.truncate(file, int(whole * keep))
    with pytest.raises(TruncatedModel, match=rf"has {int(whole * keep):,} of {whole:,} bytes; download it again"):
        gguf.check(file)


def test_a_file_that_ends_inside_its_header_is_truncated(demo_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(demo_model.read_bytes()[:400_000])
    with pytest.raises(TruncatedModel, match="ends inside its header, after 400,000 bytes; download it again"):
        gguf.check(file)


def test_the_demo_model_cut_by_one_byte_is_truncated(demo_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(demo_model.read_bytes()[:-1])
    with pytest.raises(TruncatedModel, match=r"has 98,362,431 of 98,362,432 bytes"):
        gguf.check(file)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><title>Sign in</title>", "saved web answer"),
        (b'{"error": "Repository not found"}', "saved web answer"),
        (b"Entry not found", "saved web answer"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "saved web answer"),
        (b"PK\x03\x04" + bytes(80), "not a GGUF file"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
        (b"GGUF" + struct.pack("<I", 77) + bytes(60), "format version is 77"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 50, 0), "claims 1125899906842624 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 50), "claims 1125899906842624 settings"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 63), "bytes of text"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_files.text("a") + struct.pack("<I", 99), "unknown type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_files.text("a") + struct.pack("<IIQ", 9, 9, 1), "unknown type 9"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_files.text("a") + struct.pack("<IIQ", 9, 12, 1 << 26),
            "larger than 128 MiB",
        ),
        (gguf_files.header({"general.alignment": 7}, {}), "alignment is 7"),
        (gguf_files.header({}, {"t": ((1 << 40, 1 << 40), 0)}), "impossibly large"),
        (gguf_files.header({}, {"t": ((1,) * 9, 0)}), "claims 9 dimensions"),
    ],
)
def test_what_is_no_model_is_refused_with_the_reason(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(NotAModel, match=says):
        gguf.check(file)


def test_a_missing_file_is_said_to_be_unreadable(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="cannot be read"):
        gguf.check(tmp_path / "none.gguf")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 400), junk=st.binary(min_size=1, max_size=12))
def test_damage_anywhere_in_a_header_ends_in_a_preflight_error_or_a_header(tmp_path: Path, at: int, junk: bytes) -> None:
    content = bytearray(gguf_files.header(*_small()))
    content[at : at + len(junk)] = junk
    file = tmp_path / "m.gguf"
    file.write_bytes(bytes(content) + bytes(4096))
    with contextlib.suppress(PreflightError):  # anything else would fail the test
        assert gguf.read_header(file).block_count <= gguf.MAX_LAYERS


def _small() -> tuple[gguf_files.Values, gguf_files.Tensors]:
    values: gguf_files.Values = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.list": [1, 2, 3],
        "tokenizer.ggml.tokens": ["a", "b"],
    }
    return values, {"blk.0.a": ((8, 8), gguf_files.F16), "blk.1.a": ((64,), gguf_files.Q8_0)}


def test_long_texts_and_lists_are_not_kept(tmp_path: Path) -> None:
    values: gguf_files.Values = {"long": "x" * 100_000, "many": [1] * 10_000, "few": [1] * 10}
    header = gguf.read_header(gguf_files.write(tmp_path / "m.gguf", values, {}))
    assert header.values == {"long": "x" * gguf_format.KEPT_TEXT, "few": (1,) * 10}


def test_a_tensor_of_a_newer_type_reaches_to_the_next(tmp_path: Path) -> None:
    raw = gguf_files.header({}, {"a": ((64,), gguf_files.F32), "b": ((64,), gguf_files.F32)})
    before = gguf_files.text("a") + struct.pack("<IQI", 1, 64, gguf_files.F32)
    changed = raw.replace(before, gguf_files.text("a") + struct.pack("<IQI", 1, 64, 4242))
    assert changed != raw
    file = tmp_path / "m.gguf"
    file.write_bytes(changed + bytes(512))
    assert [one.bytes for one in gguf.read_header(file).tensors] == [256, 256]


def _parts(folder: Path, count: int) -> list[Path]:
    files = []
    for number in range(count):
        shape = {f"blk.{number}.a": ((64,), gguf_files.F32)}
        values: gguf_files.Values = {"split.no": number}
        if number == 0:
            values = {"general.architecture": "llama", "llama.block_count": count}
        files.append(gguf_files.write(folder / f"m-{number + 1:05}-of-{count:05}.gguf", values, shape))
    return files


def test_a_model_in_parts_counts_all_of_them(tmp_path: Path) -> None:
    first, *others = _parts(tmp_path, 3)
    header = gguf.read_header(first)
    assert header.files == (first, *others)
    assert header.tensor_bytes == 3 * 256
    assert header.file_bytes == sum(file.stat().st_size for file in header.files)


def test_a_missing_or_wrong_part_is_named(tmp_path: Path) -> None:
    first, second, third = _parts(tmp_path, 3)
    with pytest.raises(PreflightError, match=r"part 2 of 3; choose the first part, m-00001-of-00003\.gguf"):
        gguf.check(second)
    os.truncate(third, third.stat().st_size - 1)
    with pytest.raises(TruncatedModel, match=r"m-00003-of-00003\.gguf is truncated"):
        gguf.check(first)
    third.unlink()
    with pytest.raises(TruncatedModel, match=r"m-00003-of-00003\.gguf is missing"):
        gguf.check(first)
