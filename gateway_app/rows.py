"""Queries of the snapshot: columns, pages, and rows turned into records. Runs in the snapshot's thread only (snapshot.py)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, TypeVar

from django.db.models import Model as DjangoModel
from django.db.models import Q, QuerySet

from gateway_app.directory import STOPPED, AliasRow, InstanceRow, ModelRow, RemoteRow, Rows
from gateway_app.keys import KeyRecord
from models_app.contracts import secret_box
from models_app.contracts.traits import parts_of, roles_of
from models_app.exceptions import SecretUnreadable
from models_app.models import APIKey, Instance, ModelAlias, ModelConfig, RemoteServer, Tombstone

logger = logging.getLogger(__name__)

PAGE = 2000  # rows turned into records without letting go of the interpreter for long
MODEL = (
    "name", "engine", "chat_model_path", "embedding_model_path", "tts_model_path", "one_process", "ctx_size", "enabled",
    "created_at",
)  # fmt: skip
ALIAS = ("name", "model_id")
INSTANCE = (
    "model_id", "model_name", "part", "engine", "state", "generation", "slots", "node__address", "port", "exit_reason",
    "diagnosis", "engine_secret",
)  # fmt: skip
REMOTE = ("name", "kind", "address", "models", "weight", "enabled", "max_in_flight", "created_at", "secret")
KEY = (
    "digest", "public_id", "user_id", "user__username", "scopes", "models", "expires_at", "revoked_at", "user__is_active",
    "rpm", "tpm", "parallel", "monthly_tokens", "priority", "weight", "private",
)  # fmt: skip
_LAST_ID = 2**63 - 1
_Row = TypeVar("_Row", bound=DjangoModel)


def load_all(rows: Rows, secret: str) -> None:
    """Fill empty rows with everything but keys."""
    for kind, queryset, columns, take in _tables(rows, secret):
        for page in _all(queryset.exclude(state=STOPPED) if kind is Instance else queryset, columns):
            for values in page:
                take(values)


def load_newer(rows: Rows, since: int, secret: str) -> bool:
    """Bring everything but keys up to date; whether anything was newer."""
    changed = False
    for _, queryset, columns, take in _tables(rows, secret):
        for page in _newer(queryset, columns, since):
            changed = True
            for values in page:
                take(values)
    held: dict[str, dict[int, Any]] = {
        ModelConfig._meta.db_table: rows.models,
        ModelAlias._meta.db_table: rows.aliases,
        Instance._meta.db_table: rows.instances,
        RemoteServer._meta.db_table: rows.remotes,
    }
    for table, row_id in Tombstone.objects.filter(revision__gt=since, table_name__in=held).values_list("table_name", "row_id"):
        changed = held[table].pop(row_id, None) is not None or changed
    return changed


def all_keys() -> Iterator[list[KeyRecord]]:
    """Every key, a page at a time."""
    for page in _all(APIKey.objects.all(), KEY):
        yield [_key(*values) for values in page]


def newer_keys(since: int) -> Iterator[list[KeyRecord]]:
    """Keys changed after this revision, a page at a time."""
    for page in _newer(APIKey.objects.all(), KEY, since):
        yield [_key(*values) for values in page]


def removed_keys(since: int) -> tuple[int, ...]:
    """Ids of keys deleted after this revision."""
    buried = Tombstone.objects.filter(revision__gt=since, table_name=APIKey._meta.db_table)
    return tuple(buried.values_list("row_id", flat=True))


def _tables(rows: Rows, secret: str) -> Iterator[tuple[type[DjangoModel], QuerySet[Any], tuple[str, ...], Callable[[Any], None]]]:
    def take_model(values: Any) -> None:
        row_id, name, engine, chat, embedding, speech, one_process, ctx_size, enabled, created = values
        roles = roles_of(chat, embedding, speech)
        parts = parts_of(roles, one_process)
        rows.models[row_id] = ModelRow(row_id, name, engine, roles, parts, ctx_size, enabled, int(created.timestamp()))

    def take_alias(values: Any) -> None:
        rows.aliases[values[0]] = AliasRow(*values)

    def take_instance(values: Any) -> None:
        row_id = values[0]
        if values[INSTANCE.index("state") + 1] == STOPPED:
            rows.instances.pop(row_id, None)
        else:
            clear = _unsealed(secret, values[-1], f"instance {row_id}")
            rows.instances[row_id] = InstanceRow(*(*values[:-1], clear))

    def take_remote(values: Any) -> None:
        row_id, name, kind, address, names, weight, enabled, max_in_flight, created, own_secret = values
        rows.remotes[row_id] = RemoteRow(
            row_id, name, kind, address, _names(names), weight, enabled, max_in_flight, int(created.timestamp()),
            secret=_unsealed(secret, own_secret, f"remote server {name}"),
        )  # fmt: skip

    yield ModelConfig, ModelConfig.objects.all(), MODEL, take_model
    yield ModelAlias, ModelAlias.objects.all(), ALIAS, take_alias
    yield Instance, Instance.objects.all(), INSTANCE, take_instance
    yield RemoteServer, RemoteServer.objects.all(), REMOTE, take_remote


def _all(queryset: QuerySet[_Row], columns: tuple[str, ...]) -> Iterator[list[Any]]:
    """Pages of (id, *columns) by id: a row that is deleted meanwhile is there or not, and its tombstone comes later."""
    last = 0
    while page := list(queryset.filter(id__gt=last).order_by("id").values_list("id", *columns)[:PAGE]):
        yield page
        last = page[-1][0]


def _newer(queryset: QuerySet[_Row], columns: tuple[str, ...], since: int) -> Iterator[list[Any]]:
    """Pages of (id, *columns) whose revision is above, by (revision, id). A row stamped anew while we read may come twice."""
    revision, last = since, _LAST_ID
    while True:
        newer = queryset.filter(Q(revision__gt=revision) | Q(revision=revision, id__gt=last)).order_by("revision", "id")
        page = list(newer.values_list("revision", "id", *columns)[:PAGE])
        if not page:
            return
        yield [values[1:] for values in page]
        revision, last = page[-1][:2]


def _unsealed(installation_secret: str, text: str, owner: str) -> str:
    """The secret in clear; empty, so that the backend will refuse us, where it cannot be read."""
    try:
        return secret_box.unseal(installation_secret, text)
    except SecretUnreadable as error:
        logger.error("The secret of %s cannot be read: %s", owner, error)
        return ""


def _names(value: object) -> dict[str, str]:
    """A JSON object of names; whatever else an administrator managed to store counts as none."""
    if not isinstance(value, dict):
        return {}
    return {ours: theirs for ours, theirs in value.items() if isinstance(ours, str) and isinstance(theirs, str)}


def _words(value: object) -> frozenset[str]:
    return frozenset(word for word in value if isinstance(word, str)) if isinstance(value, list) else frozenset()


def _key(
    row_id: int, digest: str, public_id: str, user_id: int, user_name: str, scopes: object, models: object,
    expires_at: datetime | None, revoked_at: datetime | None, is_active: bool, rpm: int | None, tpm: int | None,
    parallel: int | None, monthly_tokens: int | None, priority: str, weight: float, private: bool,
) -> KeyRecord:  # fmt: skip
    return KeyRecord(
        id=row_id,
        digest=bytes.fromhex(digest),
        public_id=public_id,
        user_id=user_id,
        user_name=user_name,
        scopes=_words(scopes),
        models=_words(models) if models else None,
        expires_at=expires_at.timestamp() if expires_at else None,
        usable=revoked_at is None and is_active,
        rpm=rpm,
        tpm=tpm,
        parallel=parallel,
        monthly_tokens=monthly_tokens,
        priority=priority,
        weight=weight,
        private=private,
    )
