"""The usage spool as its reader finds it."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from gateway_app.keys import KeyRecord
from gateway_app.metering import Meter, Outcome
from gateway_app.sse import Usage
from models_app.contracts import spool

KEY = KeyRecord(
    id=3, digest=b"", public_id="abc", user_id=9, user_name='Anne "A" Müller', scopes=frozenset(), models=None, expires_at=None,
    usable=True, rpm=None, tpm=None, parallel=None, monthly_tokens=None, priority="normal", weight=1.0, private=False,
)  # fmt: skip


def lines(folder: Path, pattern: str = "*") -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob(pattern)) for line in file.read_text().splitlines()]


def begin(meter: Meter, name: str) -> str:
    return meter.start(name, 1000.5, KEY, "org/tiny", "/v1/chat/completions", True)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


async def test_lines_are_what_the_contract_says(tmp_path: Path) -> None:
    meter = Meter(tmp_path, "gw")
    fields = begin(meter, "r1")
    outcome = Outcome("instance:1:2", 200, "stop", "", Usage(10, 4, None), 1.5, 20.25, 30.0)
    meter.end("r1", fields, outcome)
    start, end = lines(tmp_path)
    assert set(start) == set(spool.StartRecord.__annotations__)
    assert set(end) == set(spool.EndRecord.__annotations__)
    assert start == {key: "start" if key == "t" else end[key] for key in start}
    assert (end["user"], end["key"], end["user_name"], end["key_public_id"]) == (9, 3, 'Anne "A" Müller', "abc")
    assert (end["at"], end["stream"], end["model"], end["gateway"]) == (1000.5, True, "org/tiny", "gw")
    assert (end["prompt"], end["cached"], end["completion"]) == (10, None, 4)
    assert (end["queue_ms"], end["first_ms"], end["total_ms"]) == (1.5, 20.25, 30.0)
    meter.end("r2", begin(meter, "r2"), Outcome())
    assert (lines(tmp_path)[-1]["prompt"], lines(tmp_path)[-1]["first_ms"]) == (None, None)
    meter.close()


async def test_the_open_file_is_private_and_locked_and_closing_renames_it(tmp_path: Path) -> None:
    meter = Meter(tmp_path, "gw")
    fields = begin(meter, "r1")
    assert names(tmp_path) == ["gw.00000001.open"]
    file = tmp_path / "gw.00000001.open"
    assert spool.FILE_NAME.fullmatch(file.name)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with file.open() as reader, pytest.raises(BlockingIOError):
        fcntl.flock(reader, fcntl.LOCK_EX | fcntl.LOCK_NB)
    meter.end("r1", fields, Outcome())
    meter.close()
    assert names(tmp_path) == ["gw.00000001.jsonl"]


async def test_a_full_file_is_closed_and_running_requests_are_repeated(tmp_path: Path) -> None:
    meter = Meter(tmp_path, "gw", max_bytes=600)
    running = begin(meter, "long")
    for number in range(4):
        meter.end(f"r{number}", begin(meter, f"r{number}"), Outcome())
    closed = sorted(tmp_path.glob("*.jsonl"))
    assert len(closed) >= 2
    for file in [*closed[1:], *tmp_path.glob("*.open")]:
        first = json.loads(file.read_text().splitlines()[0])
        assert (first["t"], first["id"]) == ("start", "long")
    meter.end("long", running, Outcome())
    meter.close()
    ended = [line["id"] for line in lines(tmp_path) if line["t"] == "end"]
    assert sorted(ended) == ["long", "r0", "r1", "r2", "r3"]


async def test_an_old_file_is_closed_and_none_is_opened_without_need(tmp_path: Path) -> None:
    meter = Meter(tmp_path, "gw", max_age_s=0.05)
    meter.end("r1", begin(meter, "r1"), Outcome())
    async with asyncio.timeout(10):
        while names(tmp_path) != ["gw.00000001.jsonl"]:
            await asyncio.sleep(0.01)
    running = begin(meter, "r2")
    async with asyncio.timeout(10):
        while names(tmp_path) != ["gw.00000001.jsonl", "gw.00000002.jsonl", "gw.00000003.open"]:
            await asyncio.sleep(0.01)
    assert [line["id"] for line in lines(tmp_path, "*.open")] == ["r2"]
    await asyncio.sleep(0.2)  # only repeated starts in it, so it does not age
    assert names(tmp_path)[-1] == "gw.00000003.open"
    meter.end("r2", running, Outcome())
    meter.close()
    assert lines(tmp_path, "*00003.jsonl")[-1]["t"] == "end"


async def test_a_failing_disk_is_logged_once_and_recovered_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "spool"
    meter = Meter(folder, "gw")
    for number in range(3):
        meter.end(f"r{number}", begin(meter, f"r{number}"), Outcome())
    assert meter.lost == 6
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    folder.mkdir()
    meter.end("back", begin(meter, "back"), Outcome())
    assert [line["id"] for line in lines(folder)] == ["back", "back"]
    meter.close()


async def test_the_open_file_of_a_dead_gateway_can_be_locked(tmp_path: Path) -> None:
    meter = Meter(tmp_path, "gw")
    begin(meter, "r1")
    assert meter._fd is not None
    os.close(meter._fd)  # what the kernel does when the process is killed
    meter._fd = None
    meter.close()
    with (tmp_path / "gw.00000001.open").open() as reader:
        fcntl.flock(reader, fcntl.LOCK_EX | fcntl.LOCK_NB)
