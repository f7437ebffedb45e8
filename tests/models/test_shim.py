"""The shim on real processes: tiny stand-in engines that end in every way an engine ends."""

from __future__ import annotations

import os
import signal
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pytest_django.fixtures import Settings

from models_app import runtime_folder, shim
from models_app.engines.base import Command
from models_app.process_identity import ProcessIdentity, alive, identify, send, wait_gone

PATIENCE_S = 20.0
# A stand-in says a word into a FIFO, so that the test knows how far it has come without looking at a clock.
SAY = "import os, signal, subprocess, sys, time\ndef say(word):\n    with open(sys.argv[1], 'w') as said: said.write(word)\n"


@dataclass
class Run:
    folder: Path
    pair: runtime_folder.Pair

    def hear(self) -> str:
        """The next word of the stand-in; waits for it."""
        return (self.folder / "said").read_text()

    def end(self) -> shim.ExitRecord:
        """The exit record, once the shim is gone."""
        assert wait_gone(self.pair.shim, PATIENCE_S)
        record = runtime_folder.read_exit(self.folder)
        assert record is not None
        return record


class Stand:
    """Starts stand-in engines under real shims and leaves none behind."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._runs: list[Run] = []

    def start(self, code: str) -> Run:
        return self.start_argv([sys.executable, "-c", SAY + code, "SAID"])

    def start_argv(self, argv: list[str]) -> Run:
        number = len(self._runs) + 1
        folder = self._base / "1" / str(number)
        argv = [str(folder / "said") if part == "SAID" else part for part in argv]
        runtime_folder.prepare(folder, Command(argv=argv))
        os.mkfifo(folder / "said")
        pair = runtime_folder.spawn(folder, 1, number, {})
        assert pair is not None
        run = Run(folder, pair)
        self._runs.append(run)
        return run

    def clean(self) -> None:
        for run in self._runs:
            for process in (run.pair.shim, run.pair.engine):
                send(process, signal.SIGKILL)
                assert wait_gone(process, PATIENCE_S)


@pytest.fixture
def stand(tmp_path: Path, settings: Settings) -> Iterator[Stand]:
    settings.ASSISTANT_ENGINE_TERM_S = 0.3
    stand = Stand(tmp_path)
    yield stand
    stand.clean()


def test_an_exit_code_and_the_last_lines_are_recorded(stand: Stand) -> None:
    record = stand.start("print('loading'); print('no such tensor', file=sys.stderr); sys.exit(3)").end()
    assert (record["code"], record["signal"], record["asked"]) == (3, None, False)
    assert sorted(record["lines"]) == ["loading", "no such tensor"]
    assert record["peak_memory_bytes"] > 1_000_000


def test_a_last_line_without_a_newline_is_kept(stand: Stand) -> None:
    assert stand.start("sys.stdout.write('half a li')").end()["lines"] == ["half a li"]


def test_a_fatal_signal_is_recorded(stand: Stand) -> None:
    record = stand.start("os.kill(os.getpid(), signal.SIGSEGV)").end()
    assert (record["code"], record["signal"]) == (None, signal.SIGSEGV)


def test_a_program_that_cannot_be_started_says_so_in_its_record(stand: Stand) -> None:
    record = stand.start_argv(["/nonexistent/engine"]).end()
    assert record["code"] == 127
    assert record["lines"] == ["cannot start /nonexistent/engine: No such file or directory"]


def test_term_to_the_shim_ends_the_engine_politely(stand: Stand) -> None:
    run = stand.start("signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); say('up'); signal.pause()")
    assert run.hear() == "up"
    send(run.pair.shim, signal.SIGTERM)
    record = run.end()
    assert (record["code"], record["asked"], record["killed_after_grace"]) == (0, True, False)


def test_an_engine_deaf_to_term_is_killed_after_the_grace(stand: Stand) -> None:
    run = stand.start("signal.signal(signal.SIGTERM, signal.SIG_IGN); say('up')\nwhile True: signal.pause()")
    assert run.hear() == "up"
    send(run.pair.shim, signal.SIGTERM)
    record = run.end()
    assert (record["signal"], record["asked"], record["killed_after_grace"]) == (signal.SIGKILL, True, True)


def test_quit_to_the_shim_kills_the_engine_at_once(stand: Stand) -> None:
    run = stand.start("signal.signal(signal.SIGTERM, signal.SIG_IGN); say('up')\nwhile True: signal.pause()")
    assert run.hear() == "up"
    send(run.pair.shim, signal.SIGQUIT)
    record = run.end()
    assert (record["signal"], record["killed_after_grace"]) == (signal.SIGKILL, False)


def test_kill_9_of_the_shim_ends_the_engine(stand: Stand) -> None:
    run = stand.start("signal.signal(signal.SIGTERM, signal.SIG_IGN); say('up')\nwhile True: signal.pause()")
    assert run.hear() == "up"
    assert alive(run.pair.engine)
    send(run.pair.shim, signal.SIGKILL)
    assert wait_gone(run.pair.engine, PATIENCE_S)


@pytest.mark.parametrize("own_session", [False, True])
def test_children_of_the_engine_end_with_it(stand: Stand, own_session: bool) -> None:
    child = f"child = subprocess.Popen(['sleep', '600'], start_new_session={own_session}); say(str(child.pid))\n"
    run = stand.start(child + "signal.pause()")
    grandchild = identify(int(run.hear()))
    assert grandchild is not None
    send(run.pair.engine, signal.SIGKILL)
    run.end()
    assert not alive(grandchild)


def test_the_engine_is_detached_marked_and_in_a_group_of_its_own(stand: Stand) -> None:
    run = stand.start("say('up'); signal.pause()")
    run.hear()
    engine, owner = run.pair.engine.pid, run.pair.shim.pid
    assert os.getsid(engine) != os.getsid(0)
    assert os.getpgid(engine) == engine != os.getpgid(owner)
    for pid in (engine, owner):
        assert str(run.folder) in Path(f"/proc/{pid}/cmdline").read_text()
        assert "ASSISTANT_INSTANCE=1:1" in Path(f"/proc/{pid}/environ").read_text().split("\0")


def test_the_environment_of_an_engine_holds_no_setting_of_ours(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE_URL", "REDIS_URL", "ASSISTANT_ADMIN_PASSWORD", "AWS_SECRET_ACCESS_KEY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "must-not-leak")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    run = stand.start("say(repr(dict(os.environ)))")
    said = run.hear()
    assert "must-not-leak" not in said
    assert "'CUDA_VISIBLE_DEVICES': '1'" in said


def test_everything_in_the_runtime_folder_is_private(stand: Stand) -> None:
    run = stand.start("print('hello')")
    run.end()
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in run.folder.iterdir() if file.name != "said"}
    assert set(modes) == {"launch.json", "identity.json", "exit.json", "engine.log", "shim.log"}
    assert set(modes.values()) == {0o600}
    assert (run.folder / "shim.log").read_text() == ""


def test_a_flood_of_output_keeps_its_head_and_its_tail_within_the_cap(stand: Stand, settings: Settings) -> None:
    settings.ASSISTANT_ENGINE_LOG_BYTES = 400_000
    run = stand.start("for number in range(200_000): print('line', number)")
    record = run.end()
    logs = sorted(run.folder.glob("engine.log*"))
    assert sum(file.stat().st_size for file in logs) <= 400_000
    assert (run.folder / "engine.log").read_text().startswith("line 0\nline 1\n")
    assert record["lines"] == [f"line {number}" for number in range(199_800, 200_000)]
    assert runtime_folder.last_log_lines(run.folder, 1) == ["line 199999"]


def test_a_line_without_end_does_not_fill_the_memory(stand: Stand) -> None:
    record = stand.start("for _ in range(200): sys.stdout.write('x' * 100_000)").end()
    assert [len(line) for line in record["lines"]] == [shim.LINE_BYTES]


def test_a_signal_is_never_sent_to_a_reused_pid() -> None:
    own = identify(os.getpid())
    assert own is not None
    another_time = ProcessIdentity(own.boot_id, own.pid, own.start_ticks + 1)
    another_boot = ProcessIdentity("00000000-0000-0000-0000-000000000000", own.pid, own.start_ticks)
    for stranger in (another_time, another_boot):
        assert not alive(stranger)
        assert not send(stranger, signal.SIGKILL)
    assert alive(own)


def test_a_zombie_is_dead() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        assert identify(pid) is None
    finally:
        os.waitpid(pid, 0)
