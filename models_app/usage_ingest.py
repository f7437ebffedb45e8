"""Move the gateways' usage spool (models_app/contracts/spool.py) into UsageEvent rows.

A file is deleted only after its rows are committed; rows are unique by request id, so reading one twice changes nothing.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import transaction

from models_app.contracts.spool import CLOSED_SUFFIX, FILE_NAME, OPEN_SUFFIX
from models_app.models import APIKey, UsageEvent

log = logging.getLogger(__name__)

BATCH = 500  # rows of one transaction
MAX_LINE = 64 * 1024  # bytes; a longer one is not ours
_INT_MAX = 2**31 - 1
_ENDS = frozenset(UsageEvent.End.values) - {UsageEvent.End.GATEWAY_LOST}


class _Malformed(Exception):
    """A line that is no record; it is skipped and counted."""


@dataclass(slots=True)
class _Reading:
    """What one pass over some files found besides end records, which are handed on as they come."""

    starts: dict[str, UsageEvent] = field(default_factory=dict)
    skipped: int = 0

    def ends(self, file: BinaryIO) -> Iterator[UsageEvent]:
        for line in _lines(file):
            try:
                kind, event = parse(line)
            except _Malformed:
                self.skipped += 1
                continue
            if kind == "end":
                self.starts.pop(event.request_id, None)
                yield event
            else:
                self.starts[event.request_id] = event


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines cut at MAX_LINE, so that no file can fill the memory."""
    while line := file.readline(MAX_LINE):
        yield line


def parse(line: bytes) -> tuple[str, UsageEvent]:
    """("start" or "end", the row): a start's row says gateway_lost, for that is what it is unless its end turns up."""
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or record.get("t") not in ("start", "end"):
            raise _Malformed
        event = _start(record)
        if record["t"] == "end":
            _end(event, record)
    except (ValueError, KeyError, OverflowError, OSError) as error:
        raise _Malformed from error
    return record["t"], event


def _start(record: dict[str, Any]) -> UsageEvent:
    return UsageEvent(
        request_id=_text(record, "id", 64, exact=True),
        started_at=datetime.fromtimestamp(_number(record, "at"), UTC),
        user_id=_count(record, "user"),
        key_id=_count(record, "key"),
        user_name=_text(record, "user_name", 150),
        key_public_id=_text(record, "key_public_id", 10),
        model_name=_text(record, "model", 128),
        endpoint=_text(record, "endpoint", 64),
        stream=record["stream"] is True,
        gateway=_text(record, "gateway", 80),
        status=0,
        end_reason=UsageEvent.End.GATEWAY_LOST,
    )


def _end(event: UsageEvent, record: dict[str, Any]) -> None:
    if record["end"] not in _ENDS:
        raise _Malformed
    event.end_reason = record["end"]
    event.status = min(_count(record, "status") or 0, 999)
    event.backend = _text(record, "backend", 160)
    event.error_code = _text(record, "error_code", 64)
    event.prompt_tokens, event.cached_tokens = _count(record, "prompt"), _count(record, "cached")
    event.completion_tokens = _count(record, "completion")
    event.queue_ms, event.total_ms = _number(record, "queue_ms"), _number(record, "total_ms")
    event.first_token_ms = None if record["first_ms"] is None else _number(record, "first_ms")


def _text(record: dict[str, Any], name: str, limit: int, exact: bool = False) -> str:
    value = record[name]
    if not isinstance(value, str) or "\0" in value or (exact and not 0 < len(value) <= limit):
        raise _Malformed
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Malformed from None
    return value[:limit]


def _number(record: dict[str, Any], name: str) -> float:
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise _Malformed
    return float(value)


def _count(record: dict[str, Any], name: str) -> int | None:
    value = record[name]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _INT_MAX:
        raise _Malformed
    return value


def ingest(folder: Path | None = None) -> int:
    """Take in every closed file and what dead gateways left; how many request records were read.

    0 while another process of this machine does so: the kernel frees the lock when that one dies.
    """
    folder = folder or Path(settings.ASSISTANT_SPOOL_DIR)
    if not folder.is_dir():
        return 0
    with (folder / "ingest.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        return _ingest_folder(folder)


def _ingest_folder(folder: Path) -> int:
    closed: list[Path] = []
    unfinished: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if not (name := FILE_NAME.fullmatch(path.name)):
            continue
        if path.suffix == CLOSED_SUFFIX:
            closed.append(path)
        elif path.suffix == OPEN_SUFFIX:
            unfinished[name["gateway"]].append(path)
    read = sum(_ingest_closed(path) for path in closed)
    # After the closed ones: an end found there must be in before its start could be taken for lost.
    return read + sum(_ingest_dead(paths) for paths in unfinished.values())


def _ingest_closed(path: Path) -> int:
    reading = _Reading()
    with path.open("rb") as file:
        count = _store(reading.ends(file))
    path.unlink()
    _report(path.name, reading.skipped)
    return count


def _ingest_dead(paths: Sequence[Path]) -> int:
    """The open files of one gateway, provided it is dead: then every one of them can be locked."""
    reading = _Reading()
    with ExitStack() as stack:
        files = []
        for path in paths:
            try:
                file = stack.enter_context(path.open("rb"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, FileNotFoundError):  # it lives, or has closed this file just now
                return 0
            if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                return 0
            files.append(file)
        count = sum(_store(reading.ends(file)) for file in files)
        count += _store(iter(reading.starts.values()))
        for path in paths:
            path.unlink()
    _report(paths[0].name, reading.skipped)
    return count


def _report(name: str, skipped: int) -> None:
    if skipped:
        log.warning("Usage spool %s: %d malformed lines were skipped", name, skipped)


def _store(events: Iterator[UsageEvent]) -> int:
    count = 0
    while batch := list(islice(events, BATCH)):
        _store_batch(batch)
        count += len(batch)
    return count


def _store_batch(batch: Sequence[UsageEvent]) -> None:
    """One transaction: the rows that are new, and when their keys were last used."""
    with transaction.atomic():
        users = set(get_user_model().objects.filter(pk__in={event.user_id for event in batch}).values_list("pk", flat=True))
        keys = {key.pk: key for key in APIKey.objects.filter(pk__in={event.key_id for event in batch}).only("last_used_at")}
        for event in batch:
            # Deleted meanwhile; the names beside the keys stay.
            event.user_id = event.user_id if event.user_id in users else None
            event.key_id = event.key_id if event.key_id in keys else None
        UsageEvent.objects.bulk_create(batch, ignore_conflicts=True)
        APIKey.objects.bulk_update(_used_later(keys, batch), ["last_used_at"])


def _used_later(keys: dict[int, APIKey], batch: Iterable[UsageEvent]) -> list[APIKey]:
    """Keys whose last use moved, in the order of their ids: two writers then cannot lock each other out."""
    moved: dict[int, APIKey] = {}
    for event in batch:
        key = keys.get(event.key_id) if event.key_id is not None else None
        if key is not None and (key.last_used_at is None or key.last_used_at < event.started_at):
            key.last_used_at = event.started_at
            moved[key.pk] = key
    return [moved[pk] for pk in sorted(moved)]
