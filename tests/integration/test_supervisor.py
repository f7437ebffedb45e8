"""The supervisor of `up`, on real processes: a small `up` of its own per test (supervised_programs.py)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from assistant_site.previous_life import mark_of, survivors
from assistant_site.program_log import MAX_LINE, CappedFile, LineBuffer, Output
from assistant_site.supervised import BACKOFF_MOST_S, backoff_s, describe_exit

Begin = Callable[..., "Life"]
ROOT = Path(__file__).resolve().parents[2]
PATIENT = "import signal; print('runs'); signal.pause()"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('is deaf')\nwhile True: signal.pause()"
# Says when it is told to stop, then ends.
POLITE = """
import signal, sys
def stop(*_):
    print('told to stop')
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print('runs')
signal.pause()
"""


class Life:
    """One run of the small `up`."""

    def __init__(self, folder: Path, programs: list[dict[str, Any]], stdout: int | IO[str] = subprocess.PIPE) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.supervised_programs", str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=stdout,
            text=True,
            bufsize=1,
        )
        self.seen: list[str] = []
        assert self.process.stdin
        with self.process.stdin as stdin:
            stdin.write(json.dumps(programs))

    def saw(self, pattern: str) -> re.Match[str]:
        """The first line that matches, whether it has been read or is yet to come."""
        return next(filter(None, (re.search(pattern, line) for line in self.seen)), None) or self.read_until(pattern)

    def read_until(self, pattern: str) -> re.Match[str]:
        """Read further lines until one matches."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.seen.append(line.rstrip("\n"))
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no line like {pattern!r} in: {self.seen}")

    def ready(self) -> dict[str, int]:
        """Wait until everything runs: the pids."""
        pids: dict[str, int] = json.loads(self.read_until(r"all ready (\{.*\})")[1])
        return pids

    def finish(self) -> int:
        """Read to the end: the exit code."""
        assert self.process.stdout
        with self.process.stdout as stdout:
            self.seen += [line.rstrip("\n") for line in stdout]
        return self.process.wait(20)

    def kill(self) -> None:
        """End it as nobody should, and its output with it."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.finish()

    def position(self, text: str) -> int:
        """Of the first line that holds the text."""
        return next(index for index, line in enumerate(self.seen) if text in line)


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Life]]:
    """Starts a life in the test's folder. At the end of the test nothing of any of them may run."""
    lives: list[Life] = []

    def start(*programs: dict[str, Any], **options: Any) -> Life:
        lives.append(Life(tmp_path, list(programs), **options))
        return lives[-1]

    yield start
    left = [life.process.pid for life in lives if life.process.poll() is None]
    for life in lives:
        life.kill()
    for pid in survivors(mark_of(tmp_path)):
        left.append(pid)
        os.kill(pid, signal.SIGKILL)
    assert left == []


def wait_until_taken(pid: int, number: signal.Signals) -> None:
    """Two signals of a kind that are pending at once are one: wait until the first is not pending any more."""
    while True:
        pending = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        assert pending
        if not int(pending[1], 16) & 1 << (number - 1):
            return


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_program_that_ends_is_started_again_later_each_time(begin: Begin, tmp_path: Path) -> None:
    life = begin({"name": "steady", "code": PATIENT, "ready": "go"}, {"name": "brittle", "code": PATIENT})
    (tmp_path / "go").touch()
    first = life.ready()
    os.kill(first["brittle"], signal.SIGKILL)
    assert 0.4 <= float(life.read_until(r"brittle \| was ended by SIGKILL; starts again in (\d+\.\d) s")[1]) <= 0.6
    life.read_until(r"brittle \| runs")
    again = next(child.pid for child in psutil.Process(life.process.pid).children() if child.pid not in first.values())
    os.kill(again, signal.SIGKILL)
    assert 0.9 <= float(life.read_until(r"starts again in (\d+\.\d) s")[1]) <= 1.1
    assert psutil.pid_exists(first["steady"])
    assert life.stop() == 0


def test_back_off_doubles_up_to_half_a_minute_and_spreads_by_a_tenth() -> None:
    assert [backoff_s(failures, 0) for failures in range(1, 5)] == [0.5, 1.0, 2.0, 4.0]
    assert backoff_s(1000, 0) == BACKOFF_MOST_S
    assert backoff_s(1, 1) == pytest.approx(0.55)
    assert backoff_s(1, -1) == pytest.approx(0.45)


def test_a_level_starts_only_when_the_one_below_is_ready(begin: Begin, tmp_path: Path) -> None:
    waits_for_a_file = (
        "import pathlib, sys, time\nprint('base starts')\npathlib.Path(sys.argv[1], 'asked').touch()\nwhile True: time.sleep(9)"
    )
    life = begin(
        {"name": "top", "code": PATIENT, "level": 1}, {"name": "base", "code": waits_for_a_file, "level": 0, "ready": "ready"}
    )
    life.read_until("base starts")
    assert not any("top" in line for line in life.seen)
    (tmp_path / "ready").touch()
    life.ready()
    life.saw(r"top  \| runs")
    assert life.stop() == 0


def test_programs_stop_by_order_with_the_step_between(begin: Begin) -> None:
    orders = {"gateway": 0, "worker": 1, "console": 2, "store": 9}
    life = begin(*({"name": name, "code": POLITE, "stop_order": order} for name, order in orders.items()))
    life.ready()
    for name in orders:
        life.saw(rf"^{name} +\| runs")
    assert life.stop() == 0
    told = [line.split()[0] for line in life.seen if "told to stop" in line]
    assert told == ["gateway", "worker", "console", "store"]
    assert life.position("the step runs, hurry is False") < life.position("store   | told to stop")


def test_a_second_ctrl_c_ends_what_does_not_stop(begin: Begin) -> None:
    life = begin({"name": "deaf", "code": DEAF, "stop_timeout_s": 600})
    life.ready()
    life.saw("is deaf")
    life.process.send_signal(signal.SIGINT)
    wait_until_taken(life.process.pid, signal.SIGINT)
    life.process.send_signal(signal.SIGINT)
    assert life.finish() == 0
    assert life.position("hurry is True")


def test_twenty_thousand_lines_come_whole_and_prefixed(begin: Begin, tmp_path: Path) -> None:
    chatter = "for number in range(10000): print(f'line {number} ' + 'x' * (number % 200))\nimport signal; signal.pause()"
    life = begin({"name": "one", "code": chatter}, {"name": "two", "code": chatter})
    life.ready()
    while sum("line 9999 " in line for line in life.seen) < 2:
        life.read_until("line 9999 ")
    for name in ("one", "two"):
        lines = [line for line in life.seen if line.startswith(f"{name} | line")]
        assert lines == [f"{name} | line {number} " + "x" * (number % 200) for number in range(10000)]
    assert life.stop() == 0
    assert (tmp_path / "logs" / "one.log").read_text().count("\n") == 10000


def test_the_supervisor_and_its_programs_outlive_the_reader_of_their_output(begin: Begin, tmp_path: Path) -> None:
    flood = """
import pathlib, sys, time
for _ in range(1000):
    print('x' * 1000)
pathlib.Path(sys.argv[1], 'flooded').touch()
time.sleep(99)
"""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        life = begin({"name": "flood", "code": flood, "ready": "flooded"}, stdout=stdout)
    while not (tmp_path / "flooded").exists():
        assert life.process.poll() is None
    life.process.send_signal(signal.SIGTERM)
    assert life.process.wait(20) == 0
    assert (tmp_path / "logs" / "flood.log").read_text().count("\n") == 1000


def test_a_second_one_is_refused_and_names_the_first(begin: Begin) -> None:
    first = begin({"name": "one", "code": PATIENT})
    first.ready()
    second = begin({"name": "one", "code": PATIENT})
    assert second.finish() == 1
    assert second.seen == [f"Assistant is already running here, pid {first.process.pid}."]
    assert first.stop() == 0


def test_what_a_killed_life_left_behind_is_ended_by_the_next(begin: Begin) -> None:
    engine = f"""
import os, signal, subprocess, sys
environment = {{**os.environ, 'ASSISTANT_INSTANCE': '1:1'}}
subprocess.Popen([sys.executable, '-S', '-c', {DEAF!r}], env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
print('runs')
signal.pause()
"""
    first = begin(
        *({"name": f"deaf{number}", "code": DEAF} for number in range(3)),
        {"name": "polite", "code": PATIENT},
        {"name": "e", "code": engine},
    )
    pids = first.ready()
    for name in ("deaf0", "deaf1", "deaf2", "polite", "e"):
        first.saw(rf"^{name} +\| ")
    adopted = next(iter(psutil.Process(pids["e"]).children()))
    first.kill()
    second = begin({"name": "one", "code": PATIENT})
    assert second.read_until(r"survivors ended: (\d), left: \[\]")[1] in {"3", "4", "5"}
    assert all(gone(pids[name]) for name in ("deaf0", "deaf1", "deaf2", "polite"))
    assert not gone(adopted.pid)
    adopted.kill()
    second.ready()
    assert second.stop() == 0


def test_the_death_of_the_supervisor_reaches_a_program_that_listens(begin: Begin) -> None:
    life = begin({"name": "listens", "code": PATIENT})
    pid = life.ready()["listens"]
    child = psutil.Process(pid)
    life.kill()
    psutil.wait_procs([child], timeout=10)
    assert gone(pid)


def test_grandchildren_end_with_their_program(begin: Begin) -> None:
    parent = f"import subprocess, sys, signal; subprocess.Popen([sys.executable, '-S', '-u', '-c', {DEAF!r}]); signal.pause()"
    life = begin({"name": "parent", "code": parent})
    pid = life.ready()["parent"]
    life.saw("is deaf")
    grandchild = psutil.Process(pid).children()[0]
    os.kill(pid, signal.SIGKILL)
    life.read_until("starts again")
    psutil.wait_procs([grandchild], timeout=10)
    assert gone(grandchild.pid)
    assert life.stop() == 0


def test_a_program_that_never_starts_ends_the_start_with_its_last_lines(begin: Begin) -> None:
    life = begin({"name": "broken", "code": "raise SystemExit('no such table')", "ready": "never", "hint": "Mend it."})
    assert life.finish() == 1
    text = "\n".join(life.seen)
    assert "broken exited with code 1 3 times in a row. Its last lines:" in text
    assert re.search(r"up +\|     no such table", text)
    assert life.seen[-2].endswith("Mend it.")


def test_lines_are_cut_at_line_ends_only_and_very_long_ones_come_in_pieces() -> None:
    buffer = LineBuffer()
    assert buffer.feed(b"one\ntw") == [b"one"]
    assert buffer.feed(b"o\r\n\nthree") == [b"two", b""]
    assert buffer.finish() == [b"three"]
    assert buffer.finish() == []
    pieces = buffer.feed(b"x" * (3 * MAX_LINE)) + buffer.feed(b"y\n")
    assert b"".join(pieces) == b"x" * (3 * MAX_LINE) + b"y"
    assert max(map(len, pieces)) <= MAX_LINE + 1


def test_output_that_nobody_takes_says_it_is_full_and_calls_back_when_there_is_room() -> None:
    reader, writer = os.pipe()
    output, room = Output(writer), threading.Event()
    output.write(b"x" * 3_000_000)
    output.when_room(room.set)
    assert output.full
    assert not room.is_set()
    taken = 0
    while taken < 3_000_000:
        taken += len(os.read(reader, 1_000_000))
    assert room.wait(10)
    assert taken == 3_000_000
    output.close()
    os.close(reader)
    os.close(writer)


def test_a_log_file_is_private_and_moved_aside_when_it_is_full(tmp_path: Path) -> None:
    file = CappedFile(tmp_path / "a.log", limit=100)
    for number in range(30):
        file.write(b"%09d\n" % number)
    file.close()
    assert (tmp_path / "a.log").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "a.log").read_bytes().endswith(b"000000029\n")
    assert (tmp_path / "a.log.1").stat().st_size <= 110


def test_exits_are_told_in_words() -> None:
    assert describe_exit(3) == "exited with code 3"
    assert describe_exit(-9) == "was ended by SIGKILL"
    assert "processor lacks" in describe_exit(-4)
