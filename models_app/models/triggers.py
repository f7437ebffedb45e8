"""SQL of the triggers that keep Revision, row stamps and Tombstones (see revision.py for what they promise).

SQLite drops a table's triggers when a migration rebuilds the table, so they are installed anew after every migrate
rather than by a migration.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from django.db.backends.base.base import BaseDatabaseWrapper


@dataclass(frozen=True, slots=True)
class Watched:
    """A table that gateways copy, and the columns whose change they must learn of."""

    table: str
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Parent:
    """A table that gateways do not copy, but whose change they must learn of through its children's stamps."""

    table: str
    columns: tuple[str, ...]
    child: str
    child_key: str


WATCHED = (
    Watched(
        "models_app_modelconfig",
        (
            "name", "engine", "chat_model_path", "embedding_model_path", "tts_model_path", "prompt_template", "ctx_size",
            "slots", "one_process", "max_replicas", "min_replicas", "priority", "enabled",
        ),
    ),
    Watched("models_app_modelalias", ("name", "model_id")),
    Watched(
        "models_app_instance",
        (
            "model_id", "model_name", "part", "node_id", "engine", "state", "generation", "slots", "ctx_size", "engine_secret",
            "port", "diagnosis",
        ),
    ),
    Watched("models_app_remoteserver", ("name", "kind", "address", "models", "weight", "enabled", "max_in_flight", "secret")),
    Watched(
        "models_app_apikey",
        (
            "user_id", "name", "digest", "scopes", "models", "expires_at", "rpm", "tpm", "parallel", "monthly_tokens",
            "priority", "weight", "private", "revoked_at",
        ),
    ),
)  # fmt: skip
PARENTS = (
    Parent("auth_user", ("is_active", "username"), "models_app_apikey", "user_id"),
    Parent("models_app_node", ("address",), "models_app_instance", "node_id"),
)

BUMP = "UPDATE models_app_revision SET value = value + 1 WHERE id = 1;"
# A table emptied whole, counter first (flush), must not fail half-way; the next migrate starts a new epoch anyway.
CURRENT = "COALESCE((SELECT value FROM models_app_revision WHERE id = 1), 0)"
TOMB = "INSERT INTO models_app_tombstone (table_name, row_id, revision) VALUES"


def _sqlite() -> Iterator[str]:
    for watched in WATCHED:
        table, columns = watched.table, ", ".join(watched.columns)
        stamp = f"UPDATE {table} SET revision = {CURRENT} WHERE id = NEW.id;"
        for name, event, body in (
            ("insert", "INSERT", stamp),
            ("update", f"UPDATE OF {columns}", stamp),
            ("delete", "DELETE", f"{TOMB} ('{table}', OLD.id, {CURRENT});"),
        ):
            yield f"DROP TRIGGER IF EXISTS revision_{table}_{name}"
            yield f"CREATE TRIGGER revision_{table}_{name} AFTER {event} ON {table} BEGIN {BUMP} {body} END"
    for parent in PARENTS:
        stamp = f"UPDATE {parent.child} SET revision = {CURRENT} WHERE {parent.child_key} = NEW.id;"
        yield f"DROP TRIGGER IF EXISTS revision_{parent.table}_update"
        yield (
            f"CREATE TRIGGER revision_{parent.table}_update AFTER UPDATE OF {', '.join(parent.columns)} "
            f"ON {parent.table} BEGIN {BUMP} {stamp} END"
        )


def _postgresql() -> Iterator[str]:
    # The counter is locked by a statement trigger, before any row is: two writers that then touch each other's rows
    # queue at the counter instead of dead-locking.
    yield f"""CREATE OR REPLACE FUNCTION assistant_bump() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN {BUMP} RETURN NULL; END $$"""
    yield f"""CREATE OR REPLACE FUNCTION assistant_stamp() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN NEW.revision := {CURRENT}; RETURN NEW; END $$"""
    yield f"""CREATE OR REPLACE FUNCTION assistant_bury() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN {TOMB} (TG_TABLE_NAME, OLD.id, {CURRENT}); RETURN OLD; END $$"""
    for watched in WATCHED:
        table, columns = watched.table, ", ".join(watched.columns)
        for name, timing, body in (
            ("bump_insert", "BEFORE INSERT", "FOR EACH STATEMENT EXECUTE FUNCTION assistant_bump()"),
            ("bump_update", f"BEFORE UPDATE OF {columns}", "FOR EACH STATEMENT EXECUTE FUNCTION assistant_bump()"),
            ("bump_delete", "BEFORE DELETE", "FOR EACH STATEMENT EXECUTE FUNCTION assistant_bump()"),
            ("stamp_insert", "BEFORE INSERT", "FOR EACH ROW EXECUTE FUNCTION assistant_stamp()"),
            ("stamp_update", f"BEFORE UPDATE OF {columns}", "FOR EACH ROW EXECUTE FUNCTION assistant_stamp()"),
            ("bury", "AFTER DELETE", "FOR EACH ROW EXECUTE FUNCTION assistant_bury()"),
        ):
            yield f"DROP TRIGGER IF EXISTS revision_{name} ON {table}"
            yield f"CREATE TRIGGER revision_{name} {timing} ON {table} {body}"
    for parent in PARENTS:
        function = f"assistant_touch_{parent.child_key}"
        # Touching a watched column of the children fires their own triggers.
        yield f"""CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN UPDATE {parent.child} SET {parent.child_key} = NEW.id WHERE {parent.child_key} = NEW.id; RETURN NULL; END $$"""
        yield f"DROP TRIGGER IF EXISTS revision_children ON {parent.table}"
        yield (
            f"CREATE TRIGGER revision_children AFTER UPDATE OF {', '.join(parent.columns)} ON {parent.table} "
            f"FOR EACH ROW EXECUTE FUNCTION {function}()"
        )


def expected(vendor: str) -> set[tuple[str, str]]:
    """(trigger, table) of every one that should be there."""
    statements = {"sqlite": _sqlite, "postgresql": _postgresql}[vendor]()
    return {found for statement in statements for found in re.findall(r"CREATE TRIGGER (\w+) .*? ON (\w+)", statement)}


PRESENT = {
    "sqlite": "SELECT name, tbl_name FROM sqlite_master WHERE type = 'trigger' AND name LIKE 'revision#_%%' ESCAPE '#'",
    "postgresql": "SELECT t.tgname, c.relname FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid "
    "WHERE NOT t.tgisinternal AND t.tgname LIKE 'revision#_%%' ESCAPE '#'",
}


def fit(connection: BaseDatabaseWrapper) -> bool:
    """Whether the database has every table and column that they name."""
    tables = set(connection.introspection.table_names())
    named = [(one.table, one.columns) for one in (*WATCHED, *PARENTS)]
    if not tables.issuperset(["models_app_revision", "models_app_tombstone", *(table for table, _ in named)]):
        return False
    with connection.cursor() as cursor:
        return all(
            {column.name for column in connection.introspection.get_table_description(cursor, table)}.issuperset(columns)
            for table, columns in named
        )


def remove(connection: BaseDatabaseWrapper) -> None:
    """Drop every trigger of ours, of whatever version; install() makes the present ones."""
    with connection.cursor() as cursor:
        cursor.execute(PRESENT[connection.vendor], [])
        for name, table in cursor.fetchall():
            cursor.execute(f"DROP TRIGGER {name}" + (f" ON {table}" if connection.vendor == "postgresql" else ""))


def install(connection: BaseDatabaseWrapper) -> None:
    """Create or replace every trigger, make the counter row, and start a new epoch so that gateways reload everything."""
    statements = {"sqlite": _sqlite, "postgresql": _postgresql}[connection.vendor]
    epoch = uuid.uuid4()
    with connection.cursor() as cursor:
        for statement in statements():
            cursor.execute(statement)
        cursor.execute(
            "INSERT INTO models_app_revision (id, value, epoch) VALUES (1, 1, %s) "
            "ON CONFLICT (id) DO UPDATE SET epoch = excluded.epoch",
            [epoch if connection.vendor == "postgresql" else epoch.hex],
        )
