"""From spool files to rows: everything once, nothing lost, nothing believed that is malformed."""

from __future__ import annotations

import fcntl
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User

from models_app import keys
from models_app.contracts.spool import file_name
from models_app.models import APIKey, Revision, UsageEvent
from models_app.usage_ingest import ingest, parse

pytestmark = pytest.mark.django_db


@pytest.fixture
def key() -> APIKey:
    made, _ = keys.create_key(User.objects.create(username="ada"), "laptop", scopes=["inference"], models=[])
    return made


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path


def start(key: APIKey, number: int = 1, **changes: Any) -> dict[str, Any]:
    record = {
        "t": "start", "id": f"req-{number}", "at": 1_760_000_000.0 + number, "user": key.user_id, "key": key.pk,
        "user_name": "ada", "key_public_id": key.public_id, "model": "smol", "endpoint": "/v1/chat/completions",
        "stream": True, "gateway": "gw",
    }  # fmt: skip
    return {**record, **changes}


def end(key: APIKey, number: int = 1, **changes: Any) -> dict[str, Any]:
    record = {
        **start(key, number), "t": "end", "backend": "instance:1:1", "status": 200, "end": "stop", "error_code": "",
        "prompt": 10, "cached": None, "completion": 5, "queue_ms": 0.5, "first_ms": 20.0, "total_ms": 90.0,
    }  # fmt: skip
    return {**record, **changes}


def write(spool: Path, sequence: int, records: list[Any], suffix: str = ".jsonl", gateway: str = "gw") -> Path:
    file = spool / file_name(gateway, sequence, suffix)
    file.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records))
    return file


def ends() -> dict[str, str]:
    return dict(UsageEvent.objects.values_list("request_id", "end_reason"))


def test_an_ended_request_becomes_a_row_and_its_file_goes(spool: Path, key: APIKey) -> None:
    file = write(spool, 1, [start(key), end(key)])
    assert ingest(spool) == 1
    event = UsageEvent.objects.get()
    assert (event.request_id, event.user, event.key, event.status) == ("req-1", key.user, key, 200)
    assert (event.prompt_tokens, event.cached_tokens, event.completion_tokens) == (10, None, 5)
    assert (event.queue_ms, event.first_token_ms, event.total_ms, event.stream) == (0.5, 20.0, 90.0, True)
    assert event.started_at.timestamp() == 1_760_000_001.0
    assert not file.exists()


def test_reading_the_same_records_again_changes_nothing(spool: Path, key: APIKey) -> None:
    for _ in range(2):
        write(spool, 1, [end(key), end(key)])
        ingest(spool)
    assert UsageEvent.objects.count() == 1


def test_a_request_that_still_runs_when_its_file_is_closed_is_not_lost(spool: Path, key: APIKey) -> None:
    write(spool, 1, [start(key)])
    assert ingest(spool) == 0
    write(spool, 2, [start(key), end(key)])
    ingest(spool)
    assert ends() == {"req-1": "stop"}


def test_the_file_of_a_living_gateway_is_left_alone(spool: Path, key: APIKey) -> None:
    file = write(spool, 1, [start(key), end(key)], ".open")
    with file.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert ingest(spool) == 0
        assert file.exists()
    assert ingest(spool) == 1


def test_requests_that_died_with_their_gateway_are_told_apart_from_those_that_ended(spool: Path, key: APIKey) -> None:
    write(spool, 1, [start(key, 1), start(key, 2), end(key, 1)])
    file = write(spool, 2, [start(key, 2), start(key, 3), end(key, 3)], ".open")
    ingest(spool)
    assert ends() == {"req-1": "stop", "req-2": "gateway_lost", "req-3": "stop"}
    assert UsageEvent.objects.get(request_id="req-2").status == 0
    assert not file.exists()


def test_a_gateway_killed_between_two_files_loses_nothing(spool: Path, key: APIKey) -> None:
    write(spool, 1, [start(key, 1), start(key, 2), end(key, 1)], ".open")
    write(spool, 2, [start(key, 2), end(key, 2)], ".open")
    ingest(spool)
    assert ends() == {"req-1": "stop", "req-2": "stop"}


def test_one_living_file_keeps_all_open_files_of_its_gateway_and_no_other_s(spool: Path, key: APIKey) -> None:
    write(spool, 1, [start(key, 1)], ".open")
    living = write(spool, 2, [start(key, 1)], ".open")
    write(spool, 1, [start(key, 2)], ".open", gateway="other")
    with living.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ingest(spool)
    assert ends() == {"req-2": "gateway_lost"}


MALFORMED: list[bytes] = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"t": "end"}', b'{"t": "other"}']


def test_malformed_lines_are_skipped_counted_and_cost_no_other_line(
    spool: Path, key: APIKey, caplog: pytest.LogCaptureFixture
) -> None:
    write(spool, 1, [end(key, 1), *MALFORMED, end(key, 2), b'{"t": "end", "id": "torn'])
    with caplog.at_level(logging.WARNING):
        assert ingest(spool) == 2
    assert f"{len(MALFORMED) + 1} malformed lines" in caplog.text
    assert set(ends()) == {"req-1", "req-2"}


@pytest.mark.parametrize(
    "changes",
    [
        {"id": ""}, {"id": "x" * 65}, {"id": 7}, {"id": "a\0b"}, {"at": "now"}, {"at": -1}, {"at": 1e300}, {"at": True},
        {"user": "1"}, {"user": 2**40}, {"prompt": -1}, {"prompt": 1.5}, {"completion": True}, {"total_ms": None},
        {"end": "gateway_lost"}, {"end": "whatever"}, {"model": None}, {"user_name": "\ud800"},
    ],
)  # fmt: skip
def test_a_record_with_a_value_that_cannot_be_is_no_record(spool: Path, key: APIKey, changes: dict[str, Any]) -> None:
    write(spool, 1, [end(key, **changes)])
    assert ingest(spool) == 0
    assert not UsageEvent.objects.exists()


def test_texts_longer_than_their_column_are_cut(key: APIKey) -> None:
    _, event = parse(json.dumps(end(key, model="m" * 500, error_code="e" * 500)).encode())
    assert (len(event.model_name), len(event.error_code)) == (128, 64)


def test_usage_outlives_user_and_key(spool: Path, key: APIKey) -> None:
    record = end(key)
    key.user.delete()
    write(spool, 1, [record])
    ingest(spool)
    event = UsageEvent.objects.get()
    assert (event.user, event.key, event.user_name) == (None, None, "ada")


def test_the_last_use_of_a_key_moves_forward_only_and_bumps_no_revision(spool: Path, key: APIKey) -> None:
    before = Revision.objects.get().value
    write(spool, 1, [end(key, 5), end(key, 3)])
    ingest(spool)
    write(spool, 2, [end(key, 4)])
    ingest(spool)
    key.refresh_from_db()
    assert key.last_used_at is not None
    assert key.last_used_at.timestamp() == 1_760_000_005.0
    assert Revision.objects.get().value == before


def test_more_than_one_batch_goes_in_whole(spool: Path, key: APIKey) -> None:
    write(spool, 1, [end(key, number) for number in range(1201)])
    assert ingest(spool) == 1201
    assert UsageEvent.objects.count() == 1201


def test_other_files_and_a_missing_folder_are_no_trouble(spool: Path) -> None:
    (spool / "README").write_text("hello")
    (spool / "x.jsonl").write_text("hello")
    assert ingest(spool) == 0
    assert ingest(spool / "missing") == 0
    assert (spool / "x.jsonl").exists()


def test_while_one_process_ingests_another_does_nothing(spool: Path, key: APIKey) -> None:
    write(spool, 1, [end(key)])
    with (spool / "ingest.lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert ingest(spool) == 0
    assert ingest(spool) == 1
