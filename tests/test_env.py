"""Reading the environment: junk is named, secrets and folders are private."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from assistant_site import env


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("raw", "read"),
    [
        ("x", lambda: env.integer("ASSISTANT_DRAIN_S", 30, 0, 3600)),
        ("-1", lambda: env.integer("ASSISTANT_DRAIN_S", 30, 0, 3600)),
        ("maybe", lambda: env.boolean("ASSISTANT_DRAIN_S", True)),
        ("hypercorn", lambda: env.choice("ASSISTANT_DRAIN_S", "daphne", ("daphne", "uvicorn"))),
        ("8080", lambda: env.address("ASSISTANT_DRAIN_S", "127.0.0.1:1")),
        ("host:99999", lambda: env.address("ASSISTANT_DRAIN_S", "127.0.0.1:1")),
    ],
)
def test_junk_in_a_variable_is_refused_naming_it(monkeypatch: pytest.MonkeyPatch, raw: str, read: object) -> None:
    monkeypatch.setenv("ASSISTANT_DRAIN_S", raw)
    with pytest.raises(ImproperlyConfigured, match="ASSISTANT_DRAIN_S"):
        read()  # type: ignore[operator]


def test_addresses_are_read_with_and_without_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.address("UNSET_ADDR", "127.0.0.1:8080") == ("127.0.0.1", 8080)
    monkeypatch.setenv("ASSISTANT_HTTP_ADDR", "[::1]:9")
    assert env.address("ASSISTANT_HTTP_ADDR", "127.0.0.1:8080") == ("::1", 9)


def test_a_secret_is_made_once_privately_and_the_same_for_all_who_ask_at_once(tmp_path: Path) -> None:
    seen: list[str] = []
    threads = [threading.Thread(target=lambda: seen.append(env.secret(tmp_path, "key"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 1
    assert len(seen) == 16
    assert mode(tmp_path / "secrets" / "key") == 0o600
    assert mode(tmp_path / "secrets") == 0o700
    assert [path.name for path in (tmp_path / "secrets").iterdir()] == ["key"]


def test_an_empty_secret_file_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").touch()
    with pytest.raises(ImproperlyConfigured, match="is empty"):
        env.secret(tmp_path, "key")
    assert (tmp_path / "secrets" / "key").exists()


def test_a_home_too_deep_for_a_socket_gets_a_short_private_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = env.run_folder(Path("/" + "deep/" * 40))
    assert folder.parent == tmp_path
    assert len(str(folder / "valkey.sock")) <= env.MAX_SOCKET_PATH
    assert mode(folder) == 0o700


@pytest.mark.parametrize("letter", ["l", "ü"])
def test_every_socket_of_a_run_folder_can_be_bound(letter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "short"))
    for length in range(40):
        folder = env.run_folder(tmp_path / (letter * (1 + length)))
        for name in (settings.ASSISTANT_VALKEY_SOCKET.name, settings.ASSISTANT_CONSOLE_SOCKET.name):
            assert len(os.fsencode(folder / name)) <= env.MAX_SOCKET_PATH


def test_an_open_folder_is_closed_to_others(tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    folder.chmod(0o755)
    assert mode(env.private_folder(folder)) == 0o700


@pytest.mark.parametrize("raw", ["", "redis://:pw@host:6379/0", "rediss://host/0", "unix:///run/v.sock?db=1"])
def test_an_address_of_a_broker_is_taken_as_it_is(raw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", raw)
    assert env.redis_url("REDIS_URL") == raw


@pytest.mark.parametrize("raw", ["localhost:6379/s3cret", "http://:s3cret@host", "redis:s3cret"])
def test_what_is_no_address_of_a_broker_is_refused_without_repeating_its_password(
    raw: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", raw)
    with pytest.raises(ImproperlyConfigured, match="REDIS_URL must look like") as refused:
        env.redis_url("REDIS_URL")
    assert "s3cret" not in str(refused.value)


def test_a_node_name_fits_a_queue_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSISTANT_NODE", "büro host.example" + "x" * 100)
    name = env.node_name(tmp_path)
    assert len(name) == 63
    assert " " not in name
    assert "." not in name


def test_a_home_keeps_its_node_name_when_the_host_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASSISTANT_NODE", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "container-1")
    assert env.node_name(tmp_path) == "container-1"
    monkeypatch.setattr(socket, "gethostname", lambda: "container-2")
    assert env.node_name(tmp_path) == "container-1"
    monkeypatch.setenv("ASSISTANT_NODE", "gpu-box")
    assert env.node_name(tmp_path) == "gpu-box"
