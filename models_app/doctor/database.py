"""The database: there, up to date, writable, quick, and set up as Assistant needs it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median

from django.db import DatabaseError, connection, transaction
from django.db.migrations.executor import MigrationExecutor
from django.db.migrations.recorder import MigrationRecorder

from models_app.doctor.finding import Context, Finding, fail, ok, warn
from models_app.models import triggers

SLOW_MS = 20.0
MIGRATE = "Run: manage.py migrate."


def check(context: Context) -> Iterable[Finding]:
    file = sqlite_file()
    if file is not None and not file.exists():
        context.missing["database"] = "there is no database yet"
        yield warn(f"There is no database yet: {file} does not exist.", "manage.py up makes it.")
        return
    try:
        findings = [_latency(), *_migrations(), *_triggers(), _writable()]
        findings += _sqlite(context) if connection.vendor == "sqlite" else []
    except DatabaseError as error:
        context.missing["database"] = "the database does not work"
        yield fail(f"The database does not work: {_line(error)}.", "Check DATABASE_URL, the server, and the rights on the file.")
        return
    if any("migration" in finding.text for finding in findings if finding.level == "fail"):
        context.missing["database"] = "the database is not up to date"
    yield from findings


def sqlite_file() -> Path | None:
    """The database file, None where the database is a server."""
    default = connection.settings_dict
    return Path(default["NAME"]) if connection.vendor == "sqlite" else None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _latency() -> Finding:
    times = []
    with connection.cursor() as cursor:
        for _ in range(5):
            before = time.perf_counter()
            cursor.execute("SELECT 1")
            cursor.fetchone()
            times.append((time.perf_counter() - before) * 1000)
        version = _version()
    return judge_latency(version, median(times))


def _version() -> str:
    with connection.cursor() as cursor:
        cursor.execute("SELECT sqlite_version()" if connection.vendor == "sqlite" else "SHOW server_version")
        (version,) = cursor.fetchone()
    return f"{connection.display_name} {str(version).split()[0]}"


def judge_latency(name: str, milliseconds: float) -> Finding:
    answer = f"{name} answers within {milliseconds:.1f} ms"
    if milliseconds > SLOW_MS:
        return warn(f"{answer}, which is slow.", "Bring the database nearer, or look at its load and its disk.")
    return ok(f"{answer}.")


def _migrations() -> Iterator[Finding]:
    executor = MigrationExecutor(connection)
    plan = [str(migration) for migration, _ in executor.migration_plan(executor.loader.graph.leaf_nodes())]
    applied = {key for key in MigrationRecorder(connection).applied_migrations() if key[0] == "models_app"}
    yield judge_migrations(plan, sorted(name for _, name in applied - executor.loader.disk_migrations.keys()))


def judge_migrations(open_ones: list[str], unknown: list[str]) -> Finding:
    """open_ones: not applied yet. unknown: applied by a newer Assistant."""
    if open_ones:
        return fail(f"{len(open_ones)} migrations are not applied ({open_ones[0]} is the first).", MIGRATE)
    if unknown:
        return fail(
            f"The database was migrated by a newer Assistant ({unknown[-1]} is not known here).",
            "Install that version again, or restore a backup made with this one.",
        )
    return ok("Every migration is applied.")


def _triggers() -> Iterator[Finding]:
    query = (
        "SELECT name, tbl_name FROM sqlite_master WHERE type = 'trigger'"
        if connection.vendor == "sqlite"
        else "SELECT tgname, tgrelid::regclass::text FROM pg_trigger WHERE NOT tgisinternal"
    )
    with connection.cursor() as cursor:
        cursor.execute(query)
        there = set(cursor.fetchall())
    missing = sorted(triggers.expected(connection.vendor) - there)
    if missing:
        name, table = missing[0]
        yield fail(f"{len(missing)} triggers are missing ({name} on {table}), so gateways miss changes.", MIGRATE)
    else:
        yield ok("The triggers that tell gateways of changes are there.")


def _writable() -> Finding:
    """Write and take it back."""
    try:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("UPDATE models_app_revision SET value = value WHERE id = 1")
            transaction.set_rollback(True)
    except DatabaseError as error:
        return fail(f"The database cannot be written: {_line(error)}.", "Mend its rights, or free some disk.")
    return ok("The database can be written.")


def _sqlite(context: Context) -> list[Finding]:
    with connection.cursor() as cursor:
        mode = str(cursor.execute("PRAGMA journal_mode").fetchone()[0])
        whole = "ok" if context.fast else str(cursor.execute("PRAGMA quick_check(1)").fetchone()[0])
    findings = [judge_journal(mode)]
    if whole != "ok":
        findings.append(fail(f"The database file is damaged: {whole}.", "Stop Assistant and restore a backup."))
    return findings


def judge_journal(mode: str) -> Finding:
    if mode != "wal":
        return fail(
            f"SQLite's journal mode is {mode}, so readers and writers lock each other out.",
            "Move the database to a local disk: WAL does not work on network file systems.",
        )
    return ok("SQLite keeps a write-ahead log.")
