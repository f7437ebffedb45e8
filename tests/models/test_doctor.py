"""What the doctor concludes from what it was told: every verdict, without looking at anything."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from django.conf import settings
from django.db import DatabaseError

from models_app import catalog
from models_app.doctor import (
    broker,
    checkup,
    clock,
    database,
    exposure,
    gateways,
    listeners,
    model_files,
    packages,
    resources,
    streaming,
    workers,
)
from models_app.doctor.finding import Check, Context, Finding, Level, as_json, as_text, exit_code, fail, ok
from models_app.doctor.listeners import Fixed, Listener
from models_app.doctor.workers import Seen
from models_app.exceptions import CoordinationUnavailable
from models_app.node_memory import HostMemory
from models_app.nodes import NodeState

GIB = 1 << 30
RUNNING, IDLE = Context(running=True), Context()
NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


def levels(*findings: Finding) -> list[str]:
    return [finding.level.value for finding in findings]


class TestReport:
    FINDINGS = (
        Finding(Level.OK, "It is there.", check="disk"),
        Finding(Level.WARN, "It is old.", "Renew it.", "packages"),
        Finding(Level.FAIL, "It is gone.", "Make it.", "broker"),
    )

    def test_each_finding_is_one_line_with_its_remedy(self) -> None:
        assert as_text(self.FINDINGS, colour=False).splitlines() == [
            "ok    disk      It is there.",
            "warn  packages  It is old. Renew it.",
            "fail  broker    It is gone. Make it.",
            "",
            "1 failed, 1 to look at, 1 fine.",
        ]

    def test_colour_is_asked_for(self) -> None:
        assert "\033[31mfail\033[0m" in as_text(self.FINDINGS, colour=True)
        assert "\033" not in as_text(self.FINDINGS, colour=False)

    def test_json_holds_the_worst_level(self) -> None:
        told = json.loads(as_json(self.FINDINGS))
        assert told["status"] == "fail"
        assert told["findings"][1] == {"check": "packages", "level": "warn", "text": "It is old.", "remedy": "Renew it."}
        assert json.loads(as_json(self.FINDINGS[:2]))["status"] == "warn"
        assert json.loads(as_json([]))["status"] == "ok"

    def test_only_a_failure_fails(self) -> None:
        assert [exit_code(self.FINDINGS), exit_code(self.FINDINGS[:2])] == [1, 0]

    def test_what_cannot_be_there_while_nothing_runs_is_no_failure(self) -> None:
        assert levels(RUNNING.absent("None.", "Look."), IDLE.absent("None.", "Look.")) == ["fail", "warn"]


class TestRun:
    def test_a_check_that_needs_what_is_missing_is_not_tried(self) -> None:
        def lacks(context: Context) -> list[Finding]:
            context.missing["database"] = "the database does not work"
            return [fail("Broken.")]

        checks = (Check("database", lacks), Check("models", lambda _: [ok("Tried.")], needs=("database",)))
        found = list(checkup.run(Context(), checks))
        assert [(one.check, one.text) for one in found] == [
            ("database", "Broken."),
            ("models", "Not looked at: the database does not work."),
        ]

    @pytest.mark.parametrize(
        "error", [DatabaseError("no such table"), CoordinationUnavailable("No answer."), PermissionError(13, "denied")]
    )
    def test_a_check_that_breaks_fails_and_keeps_what_it_found(self, error: Exception) -> None:
        def breaks(_: Context) -> Any:
            yield ok("So far.")
            raise error

        found = list(checkup.run(Context(), (Check("odd", breaks), Check("next", lambda _: [ok("Goes on.")]))))
        assert levels(*found) == ["ok", "fail", "ok"]

    def test_fast_leaves_out_what_is_slow(self) -> None:
        checks = (Check("slow", lambda _: [ok("Slow.")], slow=True), Check("quick", lambda _: [ok("Quick.")]))
        assert [one.check for one in checkup.run(Context(fast=True), checks)] == ["quick"]
        assert [one.check for one in checkup.run(Context(), checks)] == ["slow", "quick"]


class TestPackages:
    def test_pins_are_read_from_lines_with_extras_and_comments(self) -> None:
        text = "# one\nDjango==5.2.19   # ORM\ncelery[redis]==5.7.0 # work\nloose>=1\n\nTwisted==26.10.0;python_version>'3'\n"
        assert packages.parse_pins(text) == {"Django": "5.2.19", "celery": "5.7.0", "Twisted": "26.10.0"}

    def test_what_differs_is_named_and_what_is_missing_fails(self) -> None:
        there = {"a": "1", "b": "2", "c": None}
        found = list(packages.judge_packages({"a": "1", "b": "3", "c": "1"}, there))
        assert levels(*found) == ["warn", "fail", "ok"]
        assert "b is 2; 3 is" in found[0].text
        assert "1 of 3" in found[2].text

    def test_no_pins_at_all_is_odd(self) -> None:
        assert levels(*packages.judge_packages({}, {})) == ["warn"]

    def test_an_old_python_fails(self) -> None:
        assert levels(packages.judge_python((3, 10, 9)), packages.judge_python((3, 11, 0))) == ["fail", "ok"]


class TestBroker:
    NETWORK: Any = {"host": "10.0.0.5", "port": 6379}  # noqa: RUF012

    def test_an_open_broker_fails_unless_it_is_a_private_socket(self) -> None:
        assert levels(broker.judge_access({"host": "127.0.0.1"}, True, False)) == ["fail"]
        assert levels(broker.judge_access({"path": "/tmp/x"}, True, False)) == ["fail"]
        assert levels(broker.judge_access({"path": "/home/x"}, True, True)) == ["ok"]
        assert levels(broker.judge_access({"path": "/tmp/x"}, False, False)) == ["ok"]

    def test_a_password_in_the_clear_over_the_network_is_warned_about(self) -> None:
        assert levels(broker.judge_access(self.NETWORK, False, False)) == ["warn"]
        encrypted = {**self.NETWORK, "connection_class": redis.SSLConnection}
        assert levels(broker.judge_access(encrypted, False, False)) == ["ok"]
        assert levels(broker.judge_access({"host": "localhost"}, False, False)) == ["ok"]

    @pytest.mark.parametrize(
        ("facts", "expected"),
        [
            ({"aof_enabled": 1, "maxmemory_policy": "noeviction"}, ["ok", "ok"]),
            ({"aof_enabled": 1, "maxmemory_policy": "allkeys-lru", "maxmemory": 100}, ["fail", "ok"]),
            ({"aof_enabled": 1, "maxmemory_policy": "allkeys-lru"}, ["warn", "ok"]),
            ({"aof_enabled": 0, "maxmemory_policy": "noeviction"}, ["ok", "warn"]),
            ({"aof_enabled": 1, "maxmemory": 100, "used_memory": 95}, ["ok", "fail", "ok"]),
            ({"aof_enabled": 1, "aof_last_write_status": "err"}, ["ok", "fail"]),
            ({"aof_enabled": 1, "rdb_last_bgsave_status": "err"}, ["ok", "ok", "warn"]),
        ],
    )
    def test_its_settings(self, facts: dict[str, Any], expected: list[str]) -> None:
        assert levels(*broker.judge_settings(facts)) == expected


class TestDatabase:
    def test_migrations(self) -> None:
        assert levels(database.judge_migrations([], [])) == ["ok"]
        pending = database.judge_migrations(["models_app.0002_x"], [])
        assert (pending.level, "manage.py migrate" in pending.remedy) == (Level.FAIL, True)
        newer = database.judge_migrations([], ["0009_later"])
        assert (newer.level, "0009_later" in newer.text) == (Level.FAIL, True)

    def test_latency_and_journal(self) -> None:
        assert levels(database.judge_latency("SQLite 3", 0.1), database.judge_latency("PostgreSQL 17", 50.0)) == ["ok", "warn"]
        assert levels(database.judge_journal("wal"), database.judge_journal("delete")) == ["ok", "fail"]


class TestExposure:
    @pytest.mark.parametrize(
        ("host", "count"), [("127.0.0.1", 0), ("::1", 0), ("localhost", 0), ("0.0.0.0", 1), ("::", 1), ("example.org", 1)]
    )
    def test_an_address_beyond_this_machine_is_warned_about(self, host: str, count: int) -> None:
        assert levels(*exposure.judge_address("ASSISTANT_HTTP_ADDR", host)) == ["warn"] * count

    def test_modes(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder").chmod(0o755)
        (tmp_path / "secret").write_text("x")
        (tmp_path / "secret").chmod(0o640)
        (tmp_path / "mine").write_text("x")
        (tmp_path / "mine").chmod(0o600)
        us = tmp_path.stat().st_uid
        names = ("folder", "secret", "mine", "missing")
        found = list(exposure.judge_private([tmp_path / name for name in names], us))
        assert [finding.remedy for finding in found] == [
            f"Run: chmod 700 {tmp_path}/folder.",
            f"Run: chmod 600 {tmp_path}/secret.",
        ]
        assert levels(*exposure.judge_private([tmp_path / "mine"], us + 1)) == ["fail"]

    def test_a_model_folder_that_everybody_may_write(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o777)
        assert levels(*exposure.judge_model_folder(tmp_path)) == ["warn"]
        tmp_path.chmod(0o755)
        assert levels(*exposure.judge_model_folder(tmp_path)) == []


class TestClock:
    def test_year_steps_ntp_and_skew(self) -> None:
        assert levels(*map(clock.judge_year, (1970, 2026, 2106))) == ["fail", "ok", "fail"]
        assert levels(clock.judge_steps(1.0, 1.01), clock.judge_steps(-3599.0, 1.0)) == ["ok", "warn"]
        assert levels(*map(clock.judge_ntp, ("yes", "no", ""))) == ["ok", "warn", "ok"]
        assert levels(*map(clock.judge_skew, (0.1, -30.0))) == ["ok", "fail"]

    def test_a_record_of_tomorrow_tells_that_the_clock_was_set_back(self) -> None:
        assert levels(*clock.judge_newest(NOW + timedelta(hours=1), NOW)) == ["warn"]
        assert levels(*clock.judge_newest(NOW, NOW), *clock.judge_newest(None, NOW)) == []


class TestResources:
    def test_disk(self) -> None:
        assert levels(
            resources.judge_disk("home", 100 * GIB, 0.5),
            resources.judge_disk("home", GIB, 0.5),
            resources.judge_disk("home", GIB // 10, 0.5),
            resources.judge_disk("home", 100 * GIB, 0.001),
        ) == ["ok", "warn", "fail", "warn"]

    def test_memory(self) -> None:
        assert levels(resources.judge_memory(HostMemory(16 * GIB, 8 * GIB, None))) == ["ok"]
        tight = resources.judge_memory(HostMemory(2 * GIB, 1000, 2 * GIB))
        assert (tight.level, "0.0 of 2.0 GiB of memory are free in this container" in tight.text) == (Level.WARN, True)


class TestListeners:
    GATEWAY = Listener(7, "python", ("python", "manage.py", "gateway"))
    OTHER = Listener(8, "nginx", ("nginx", "-g", "daemon off"))

    @pytest.mark.parametrize(
        ("found", "context", "level"),
        [(None, IDLE, "ok"), (None, RUNNING, "fail"), (GATEWAY, IDLE, "ok"), (OTHER, IDLE, "fail"), (OTHER, RUNNING, "fail")],
    )
    def test_a_public_address_is_free_or_ours(self, found: Listener | None, context: Context, level: str) -> None:
        told = listeners.judge_public("127.0.0.1:80", "ASSISTANT_HTTP_ADDR", "gateway", found, context)
        assert told.level == level
        assert found is not self.OTHER or "nginx, pid 8" in told.text

    def test_engine_ports(self) -> None:
        assert levels(*(listeners.judge_span(1, 1000, free) for free in (900, 50, 0))) == ["ok", "warn", "fail"]
        found = list(listeners.judge_overlaps(range(20_000, 30_000), [8080, 20_500], range(29_000, 61_000)))
        assert levels(*found) == ["warn", "warn"]
        assert levels(*listeners.judge_overlaps(range(20_000, 30_000), [8080], range(32_768, 61_000))) == []

    def test_fixed_ports_of_two_models_or_of_ours_collide(self) -> None:
        models = [Fixed("a", 9001, 1), Fixed("b", 9001, 1), Fixed("c", 8080, 1), Fixed("d", 9004, 2), Fixed("e", 9005, 1)]
        found = list(listeners.judge_fixed(models, {"ASSISTANT_HTTP_ADDR": 8080}))
        assert [(finding.level.value, finding.text.split()[0]) for finding in found] == [
            ("fail", "b"),
            ("fail", "c"),
            ("warn", "d"),
        ]


class TestWorkers:
    def test_nodes(self) -> None:
        seen = [
            Seen("a", NodeState.READY, 1),
            Seen("b", NodeState.CORDONED, 0),
            Seen("c", NodeState.UNKNOWN, 0),
            Seen("d", NodeState.UNKNOWN, 2),
        ]
        assert levels(*workers.judge_nodes(seen, RUNNING)) == ["ok", "ok", "warn", "fail"]
        assert levels(*workers.judge_nodes(seen, IDLE)) == ["ok", "ok", "warn", "warn"]
        assert levels(*workers.judge_nodes([], RUNNING)) == ["fail"]

    def test_queues_without_a_worker_and_queues_that_grow(self) -> None:
        lengths = {"control": 0, "node.a": 3, "bulk.a": 5000}
        found = list(workers.judge_queues(lengths, {"control", "bulk.a"}, RUNNING))
        assert levels(*found) == ["ok", "fail", "warn"]
        assert "3 tasks waiting" in found[1].text
        assert levels(*workers.judge_queues(lengths, set(), IDLE)) == ["warn"] * 3

    def test_beat(self) -> None:
        assert levels(workers.judge_beat(None, RUNNING), workers.judge_beat(None, IDLE)) == ["fail", "warn"]
        assert levels(workers.judge_beat("elsewhere/boot/7/9/x", RUNNING)) == ["ok"]
        assert levels(workers.judge_beat(f"{settings.ASSISTANT_NODE}/boot/7/9/x", RUNNING)) == ["fail"]
        assert levels(workers.judge_beat("nonsense", RUNNING)) == ["warn"]


class TestGateways:
    def test_alive_and_spool(self) -> None:
        assert levels(gateways.judge_alive([], RUNNING), gateways.judge_alive(["g on node a"], RUNNING)) == ["fail", "ok"]
        assert levels(
            gateways.judge_spool(2, 1000, 1.0), gateways.judge_spool(2, 1000, 500.0), gateways.judge_spool(9, 1 << 30, 1.0)
        ) == ["ok", "warn", "warn"]


class TestStreaming:
    @pytest.mark.parametrize(
        ("arrivals", "level"),
        [
            ([0.0, 0.1, 0.2, 0.3, 0.4], "ok"),
            ([0.0, 0.0, 0.2, 0.3, 0.4], "ok"),
            ([0.4, 0.4, 0.4, 0.4, 0.4], "fail"),
            ([0.3, 0.3, 0.3, 0.4, 0.4], "fail"),
            ([0.0, 0.1], "fail"),
            ([], "fail"),
        ],
    )
    def test_events_must_come_as_they_were_sent(self, arrivals: list[float], level: str) -> None:
        assert streaming.judge("https://ai.example.org", arrivals).level == level


def test_a_file_that_is_not_what_the_catalogue_says_fails() -> None:
    entry = catalog.entry(catalog.DEMO)
    assert model_files.judge_hash(Path("m.gguf"), entry.sha256, entry) == ok("m.gguf is exactly what the catalogue says.")
    other = model_files.judge_hash(Path("m.gguf"), "0" * 64, entry)
    assert (other.level, entry.name in other.remedy) == (Level.FAIL, True)
