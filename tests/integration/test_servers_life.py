"""How a serving process begins and ends, on both servers: the taken address, the drain, the second signal, broken pipes."""

from __future__ import annotations

import contextlib
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from assistant_site.binding import AddressInUse, bind_unix, is_loopback
from tests.served import ROOT, Served, json_of, read_all, read_until, served

both = pytest.mark.parametrize("kind", ["daphne", "uvicorn"])


def begin_duet(process: Served) -> socket.socket:
    """A request whose answer has begun and whose body goes on."""
    connection = process.connect()
    connection.sendall(b"POST /duet HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
    read_until(connection, b"one")
    return connection


@both
def test_a_taken_port_is_named_with_its_holder(kind: str) -> None:
    with served(kind) as holder:
        second = subprocess.run(
            [sys.executable, "-m", "tests.fakes.served_app", kind, "--port", str(holder.port)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    assert second.returncode == 1
    expected = f"Address 127.0.0.1:{holder.port} is in use (pid {holder.process.pid} python"
    assert expected in second.stderr
    assert "Stop it or set ASSISTANT_HTTP_ADDR." in second.stderr
    assert "Traceback" not in second.stderr


@both
def test_a_stream_that_ends_in_time_ends_whole_after_term(kind: str) -> None:
    with served(kind, "--drain", "20") as process, begin_duet(process) as connection:
        process.terminate()

        connection.sendall(b"3\r\ntwo\r\n0\r\n\r\n")

        assert read_all(connection).endswith(b"two\r\n0\r\n\r\n")
        assert process.wait() == 0


@both
def test_a_stream_that_goes_on_is_cut_visibly_when_the_drain_is_over(kind: str) -> None:
    with served(kind, "--drain", "0.5") as process, begin_duet(process) as connection:
        process.terminate()

        assert not read_all(connection).endswith(b"0\r\n\r\n")
        assert process.wait() == 0
    assert any("service: stopped" in line for line in process.log)
    assert not any("Traceback" in line or "ERROR" in line for line in process.log)


@both
def test_a_second_signal_ends_the_drain_at_once(kind: str) -> None:
    with served(kind, "--drain", "600") as process, begin_duet(process) as connection:
        process.terminate()
        process.process.send_signal(signal.SIGINT)

        read_all(connection)
        assert process.wait() == 0


@both
def test_while_draining_no_connection_is_taken_and_idle_ones_are_closed(kind: str) -> None:
    with served(kind, "--drain", "20") as process, begin_duet(process) as connection, process.connect() as idle:
        idle.sendall(b"GET /echo HTTP/1.1\r\nhost: t\r\n\r\n")
        read_until(idle, b"}")

        process.terminate()

        assert read_all(idle) == b""
        with contextlib.suppress(ConnectionRefusedError):
            while True:  # ends by refusal: the listener closes right after the signal
                process.connect().close()
        connection.sendall(b"0\r\n\r\n")
        assert process.wait() == 0


@both
@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"GET / HT",
        b"POST /echo HTTP/1.1\r\nhost: t\r\ncontent-length: 10\r\n\r\nabc",
        b"GET /empty HTTP/1.1\r\nhost: t\r\n\r\n",
    ],
    ids=["nothing", "half a head", "half a body", "idle"],
)
def test_a_client_that_sends_no_more_is_given_up(hurried: dict[str, Served], kind: str, start: bytes) -> None:
    with hurried[kind].connect() as connection:
        connection.sendall(start)

        read_all(connection)  # returns when the server closes


@pytest.fixture(scope="module")
def hurried() -> Iterator[dict[str, Served]]:
    with served("daphne", "--hurry") as daphne, served("uvicorn", "--hurry") as uvicorn:
        yield {"daphne": daphne, "uvicorn": uvicorn}


def test_a_client_that_never_reads_is_given_up(hurried: dict[str, Served]) -> None:
    with hurried["daphne"].connect() as connection:
        connection.sendall(b"GET /flood HTTP/1.1\r\nhost: t\r\n\r\n")

        hurried["daphne"].get("/await/given-up")


@both
def test_a_dead_supervisor_does_not_spoil_the_exit(kind: str) -> None:
    with served(kind, break_pipes=True) as process:
        process.process.send_signal(signal.SIGTERM)

        assert process.wait() == 0


def test_a_unix_socket_is_for_its_owner_and_tells_the_forwarded_client(tmp_path: Path) -> None:
    path = tmp_path / "private" / "console.sock"
    with served("daphne", "--unix", str(path)) as process:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            head = b"x-forwarded-for: 203.0.113.7\r\nx-forwarded-port: 4711\r\nx-forwarded-proto: https\r\n"
            connection.sendall(b"GET / HTTP/1.1\r\nhost: t\r\n" + head + b"connection: close\r\n\r\n")
            answer = json_of(read_all(connection))
        assert answer["client"] == ["203.0.113.7", 4711]
        assert answer["scheme"] == "https"
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        with pytest.raises(AddressInUse, match="in use by another process"):
            bind_unix(path)

        process.terminate()
        assert process.wait() == 0
    assert not path.exists()


def test_the_socket_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "console.sock"
    tmp_path.chmod(0o700)
    with served("daphne", "--unix", str(path)) as process:
        process.process.kill()
        process.wait()
    assert path.exists()

    with served("daphne", "--unix", str(path)), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))


@pytest.mark.parametrize(
    ("address", "local"), [("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("192.0.2.1", False)]
)
def test_only_loopback_addresses_are_private(address: str, local: bool) -> None:
    assert is_loopback(address) is local
