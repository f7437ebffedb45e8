"""The embedded Valkey, for real."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, OutOfMemoryError

from assistant_site.valkey import Valkey, ValkeyFailed

PASSWORD = 'a "strange" pass\\word'


@pytest.fixture
def place(tmp_path: Path) -> Valkey:
    (tmp_path / "run").mkdir(mode=0o700)
    return Valkey(folder=tmp_path / "a folder", socket=tmp_path / "run" / "v.sock", password=PASSWORD)


@pytest.fixture
def client(place: Valkey) -> Iterator[Redis]:
    with Redis(unix_socket_path=str(place.socket), password=PASSWORD) as redis:
        yield redis


def test_it_listens_on_a_private_socket_and_on_no_port(place: Valkey) -> None:
    with place.running() as pid:
        assert psutil.Process(pid).net_connections(kind="inet") == []
        assert place.socket.stat().st_mode & 0o077 == 0


def test_without_the_password_it_gives_nothing(place: Valkey) -> None:
    with place.running(), Redis(unix_socket_path=str(place.socket)) as stranger, pytest.raises(AuthenticationError):
        stranger.get("anything")


def test_the_password_is_in_a_private_file_and_in_no_argument(place: Valkey) -> None:
    with place.running() as pid:
        process = psutil.Process(pid)
        assert all("strange" not in word for word in [*process.cmdline(), *process.environ().values()])
        assert (place.folder / "valkey.conf").stat().st_mode & 0o777 == 0o600
        assert place.folder.stat().st_mode & 0o777 == 0o700


def test_a_full_one_refuses_writes_instead_of_forgetting(place: Valkey, client: Redis) -> None:
    with place.running():
        assert client.config_get("maxmemory")["maxmemory"] == str(256 * 1024 * 1024)
        client.set("first", "kept")
        client.config_set("maxmemory", "8mb")
        filled = client.pipeline(transaction=False)
        for number in range(20):
            filled.set(f"filler {number}", "x" * 1024 * 1024)
        with pytest.raises(OutOfMemoryError):
            filled.execute()
        assert client.get("first") == b"kept"


def test_what_was_queued_survives_a_kill(place: Valkey, client: Redis) -> None:
    with place.running() as pid:
        client.rpush("queue", "task")
        os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid)], timeout=0)
    with place.running():
        assert client.lrange("queue", 0, -1) == [b"task"]


async def test_readiness_is_an_answer_to_our_password(place: Valkey) -> None:
    assert not await place.ready()
    with place.running():
        assert await place.ready()
        assert not await Valkey(place.folder, place.socket, "wrong").ready()


def test_one_that_cannot_start_shows_its_last_words_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValkeyFailed) as failed, Valkey(tmp_path / "v", tmp_path / "missing" / "v.sock", "x").running():
        pass
    assert "exited with code 1" in str(failed.value)
    assert "No such file or directory" in str(failed.value)
    assert "REDIS_URL" in str(failed.value)
