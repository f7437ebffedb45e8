"""`manage.py fetch_engine`: the pinned file comes to its place whole, and nothing unpinned comes at all."""

from __future__ import annotations

import hashlib
import io
import json
import random
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command
from pytest_django.fixtures import Settings

from models_app.downloads import size_of
from models_app.engines.base import EngineSettings
from models_app.engines.wasmedge_runtime import check_wasm
from models_app.exceptions import DownloadError
from tests.fakes.file_server import Answer, FileServer, file_server

CONTENT = b"\0asm" + random.Random(3).randbytes(2_500_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def target(settings: Settings, tmp_path: Path) -> Path:
    settings.ASSISTANT_WASM_FILE = tmp_path / "engines" / "llama-api-server.wasm"
    settings.ASSISTANT_WASM_SHA256 = SHA256
    return tmp_path / "engines" / "llama-api-server.wasm"


def fetch_engine(settings: Settings, server: FileServer | str, *arguments: str) -> str:
    settings.ASSISTANT_WASM_URL = server if isinstance(server, str) else server.url
    out = io.StringIO()
    call_command("fetch_engine", *arguments, stdout=out)
    return out.getvalue().strip()


def test_the_file_is_fetched_verified_and_ready_to_run(settings: Settings, target: Path) -> None:
    with file_server(CONTENT) as server:
        assert fetch_engine(settings, server) == str(target)
        assert target.read_bytes() == CONTENT
        check_wasm(EngineSettings("wasmedge", target, SHA256, "llama-server"))
        asked = len(server.ranges)
        assert json.loads(fetch_engine(settings, server, "--json")) == {"path": str(target), "sha256": SHA256}
        assert len(server.ranges) == asked  # the second call verifies what is there and asks nobody
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_redirect_is_followed_and_a_broken_download_goes_on(settings: Settings, target: Path) -> None:
    with file_server(CONTENT) as storage, file_server(CONTENT) as release:
        release.script = [Answer(redirect=storage.url), Answer(redirect=storage.url), Answer(redirect=storage.url)]
        storage.script = [Answer(), Answer(cut_after=1_000_000)]  # asked for its size, then cut
        fetch_engine(settings, release)
    assert target.read_bytes() == CONTENT
    assert storage.ranges[-1] is not None


def test_other_bytes_than_the_pinned_ones_never_become_the_file(settings: Settings, target: Path) -> None:
    with file_server(CONTENT[:-1] + b"x") as server, pytest.raises(CommandError, match="not the expected"):
        fetch_engine(settings, server)
    assert list(target.parent.iterdir()) == []


def test_another_file_in_its_place_is_told_and_kept(settings: Settings, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"\0asm of another version")
    with file_server(CONTENT) as server, pytest.raises(CommandError, match="remove it to fetch it again"):
        fetch_engine(settings, server)
    assert target.read_bytes() == b"\0asm of another version"


@pytest.mark.parametrize(
    ("sha256", "told"), [("", "is empty, and nothing unpinned is run: set it to"), ("f00", "is not 64 lower-case hexadecimal")]
)
def test_nothing_is_asked_for_without_a_checksum(settings: Settings, target: Path, sha256: str, told: str) -> None:
    settings.ASSISTANT_WASM_SHA256 = sha256
    with file_server(CONTENT) as server:
        with pytest.raises(CommandError, match=told):
            fetch_engine(settings, server)
        assert server.ranges == []
    assert not target.exists()


def test_latest_is_refused(settings: Settings, target: Path) -> None:
    with pytest.raises(CommandError, match="names “latest”; name a release by its version"):
        fetch_engine(settings, "https://example.org/releases/latest/download/llama-api-server.wasm")
    assert not target.exists()


def test_a_local_copy_serves_where_there_is_no_network(settings: Settings, target: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.wasm").write_bytes(CONTENT)
    fetch_engine(settings, str(tmp_path / "copy.wasm"))
    assert target.read_bytes() == CONTENT


def test_the_default_source_names_its_version(settings: Settings) -> None:
    assert "/latest/" not in settings.ASSISTANT_WASM_URL
    assert "/0.28.0/llama-api-server.wasm" in settings.ASSISTANT_WASM_URL


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer(status=404), "answered 404; check the address"),
        (Answer(announces=False), "does not say how large the file is"),
        (Answer(redirect="ftp://elsewhere/x"), r"(?i)ftp|unsupported"),
    ],
)
def test_a_source_that_tells_no_size_is_refused(answer: Answer, told: str) -> None:
    with file_server(CONTENT, answer) as server, pytest.raises(DownloadError, match=told):
        size_of(server.url)


def test_a_source_without_a_listener_or_of_another_kind_is_refused() -> None:
    with file_server(CONTENT) as server:
        url = server.url
    with pytest.raises(DownloadError, match="cannot be asked for the file"):
        size_of(url)
    with pytest.raises(DownloadError, match="size of pypi:x==1#y is not known"):
        size_of("pypi:x==1#y")
    with pytest.raises(DownloadError, match="Cannot read /no/such"):
        size_of("/no/such")
