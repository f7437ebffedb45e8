"""Own one engine process: its log, its exit record, its process group. Standard library only; run by path: shim.py <folder>.

The folder is ASSISTANT_HOME/instances/<instance id>/<generation> and holds, all 0600:

    launch.json    read here: argv, grace_s, log_bytes
    identity.json  written once the engine is spawned: who shim and engine are
    engine.log …   the engine's output, capped: the head, and two files that take turns for the tail
    exit.json      written when the engine has ended: see ExitRecord

Signals: TERM asks the engine's group to end and kills it after grace_s; QUIT kills it at once. When the shim itself dies
the kernel kills the engine. Single-threaded throughout, for PR_SET_PDEATHSIG follows the thread that forked.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any, TypedDict

LAUNCH = "launch.json"
IDENTITY = "identity.json"
EXIT = "exit.json"
LOG = "engine.log"
OK = b"ok\n"  # what the starter reads from our standard output once identity.json is there

PR_SET_CHILD_SUBREAPER = 36
TAIL_LINES = 200
LINE_BYTES = 4096
CHUNK = 65536


class LaunchFile(TypedDict):
    """launch.json."""

    argv: list[str]
    grace_s: float  # seconds between TERM and KILL
    log_bytes: int  # cap of the run's log files together


class IdentityFile(TypedDict):
    """identity.json: pids with their start ticks, valid for this boot only."""

    boot_id: str
    shim_pid: int
    shim_start_ticks: int
    engine_pid: int
    engine_start_ticks: int
    started_at: float  # Unix time


class ExitRecord(TypedDict):
    """exit.json. Exactly one of code and signal is a number."""

    code: int | None
    signal: int | None
    asked: bool  # we had been told to end it
    killed_after_grace: bool  # it did not follow TERM
    lines: list[str]  # the last lines of its output, at most TAIL_LINES
    peak_memory_bytes: int
    oom_kills: int  # kills by the kernel for want of memory while it ran: in our cgroup, else on this machine
    ended_at: float  # Unix time


class CappedLog:
    """A log that keeps its beginning and its end: a quarter of the cap for the head, the rest for two tail files.

    When the disk is full output is dropped; the engine must never stand still for its log.
    """

    def __init__(self, path: Path, cap: int) -> None:
        self._path = path
        self._head_left = cap // 4
        self._tail_cap = max(1, cap * 3 // 8)
        self._tail_left = 0
        self._tail = path.with_name(path.name + ".tail")
        self._file = path.open("ab", buffering=0)
        self._last: deque[bytes] = deque(maxlen=TAIL_LINES)
        self._partial = b""

    def write(self, data: bytes) -> None:
        self._remember(data)
        with contextlib.suppress(OSError):
            while data:
                data = self._write_some(data)

    def _write_some(self, data: bytes) -> bytes:
        """Write what the present file still takes; the rest is returned."""
        if self._head_left > 0:
            piece = data[: self._head_left]
            self._head_left -= len(piece)
        else:
            if self._tail_left <= 0:
                self._turn()
            piece = data[: self._tail_left]
            self._tail_left -= len(piece)
        self._file.write(piece)
        return data[len(piece) :]

    def _turn(self) -> None:
        """Begin a new tail file; the one before becomes the older half, the one before that goes."""
        if self._tail.exists():
            self._tail.replace(self._tail.with_name(self._tail.name + ".1"))
        self._file.close()
        self._file = self._tail.open("wb", buffering=0)
        self._tail_left = self._tail_cap

    def _remember(self, data: bytes) -> None:
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._last.extend(line[:LINE_BYTES] for line in lines)
        self._partial = self._partial[:LINE_BYTES]

    def last_lines(self) -> list[str]:
        lines = [*self._last, self._partial] if self._partial else list(self._last)
        return [line.decode("utf-8", "replace").rstrip("\r") for line in lines[-TAIL_LINES:]]


class Shim:
    """One engine, from spawn to exit record."""

    def __init__(self, folder: Path, launch: LaunchFile) -> None:
        self._folder = folder
        self._launch = launch
        self._log = CappedLog(folder / LOG, launch["log_bytes"])
        self._asked = False
        self._kill_now = False
        self._kill_at: float | None = None
        self._killed_after_grace = False
        self._oom_before = oom_kills()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._pid = 0
        self._output = -1

    def spawn(self) -> None:
        """Start the engine through the exec helper, in a process group of its own, and write identity.json."""
        self._listen_to_signals()
        helper = Path(__file__).with_name("shim_exec.py")
        argv = [sys.executable, "-I", "-S", str(helper), str(os.getpid()), *self._launch["argv"]]
        read, write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(read, False)
        engine = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=write, stderr=write, cwd=self._folder, process_group=0)
        os.close(write)
        self._pid, self._output = engine.pid, read
        engine.returncode = 0  # reaped by us, not by Popen
        identity: IdentityFile = {
            "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "shim_pid": os.getpid(),
            "shim_start_ticks": start_ticks(os.getpid()),
            "engine_pid": self._pid,
            "engine_start_ticks": start_ticks(self._pid),
            "started_at": time.time(),
        }
        write_json(self._folder / IDENTITY, identity)

    def _listen_to_signals(self) -> None:
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGQUIT, self._on_quit)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only to wake the loop
        for ignored in (signal.SIGINT, signal.SIGHUP):
            signal.signal(ignored, signal.SIG_IGN)

    def _on_term(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True

    def _on_quit(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = self._kill_now = True

    def watch(self) -> ExitRecord:
        """Pump output and obey signals until the engine has ended; nothing of its group survives."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while not self._engine_ended():
                self._obey()
                for key, _ in selector.select(self._patience()):
                    if key.fd == self._wake_read:
                        os.read(self._wake_read, 512)
                    elif self._pump() == b"":
                        selector.unregister(self._output)
        return self._bury()

    def _patience(self) -> float | None:
        return None if self._kill_at is None else max(0.0, self._kill_at - time.monotonic())

    def _obey(self) -> None:
        if self._kill_now:
            self._signal_group(signal.SIGKILL)
        elif self._asked and self._kill_at is None:
            self._kill_at = time.monotonic() + self._launch["grace_s"]
            self._signal_group(signal.SIGTERM)
        elif self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._killed_after_grace = True
            self._kill_at = time.monotonic() + 1.0
            self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        """The engine is unreaped, so its group id cannot be anybody else's."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, number)

    def _pump(self) -> bytes | None:
        """Move a piece of output to the log. None where none is there now, empty at its end."""
        try:
            data = os.read(self._output, CHUNK)
        except BlockingIOError:
            return None
        self._log.write(data)
        return data

    def _engine_ended(self) -> bool:
        """Reap adopted orphans; True once the engine is a zombie. It is left unreaped to hold its group id."""
        while True:
            ended = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                return True
            other = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if other is None:
                return False
            if other.si_pid != self._pid:
                os.waitpid(other.si_pid, 0)

    def _bury(self) -> ExitRecord:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        _, status, usage = os.wait4(self._pid, 0)
        end_descendants()
        while self._pump():  # what it wrote before it died
            pass
        code = os.waitstatus_to_exitcode(status)
        return {
            "code": code if code >= 0 else None,
            "signal": -code if code < 0 else None,
            "asked": self._asked,
            "killed_after_grace": self._killed_after_grace,
            "lines": self._log.last_lines(),
            "peak_memory_bytes": usage.ru_maxrss * 1024,
            "oom_kills": max(0, oom_kills() - self._oom_before),
            "ended_at": time.time(),
        }


def end_descendants(patience_s: float = 2.0) -> None:
    """Kill and reap processes that left the engine's group and became ours as their subreaper."""
    until = time.monotonic() + patience_s
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            for pid in children.read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        try:
            reaped, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not reaped:
            time.sleep(0.01)


def start_ticks(pid: int) -> int:
    """Start time of a process of ours in clock ticks since boot."""
    return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])


def oom_kills() -> int:
    """The kernel's count of out-of-memory kills: of our cgroup where it tells, else of the machine, else 0."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
        sources = (Path("/sys/fs/cgroup" + group) / "memory.events", Path("/proc/vmstat"))
    except OSError:
        sources = (Path("/proc/vmstat"), Path("/proc/vmstat"))
    for source in sources:
        with contextlib.suppress(OSError):
            for line in source.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(value))
    draft.replace(path)


def detach(folder: Path) -> int:
    """Fork twice into a session of our own, orphaned, with no terminal and no inherited output.

    Returns the descriptor on which the starter waits for our report.
    """
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    own_log = os.open(folder / "shim.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for target, source in ((0, nothing), (1, nothing), (2, own_log)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(own_log)
    return report


def main(arguments: list[str]) -> int:
    os.umask(0o077)
    folder = Path(arguments[0])
    launch: LaunchFile = json.loads((folder / LAUNCH).read_text())
    report = detach(folder)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    shim = Shim(folder, launch)
    try:
        shim.spawn()
    except OSError as error:
        os.write(report, f"{error}\n".encode())
        return 1
    with contextlib.suppress(BrokenPipeError):
        os.write(report, OK)
    os.close(report)
    write_json(folder / EXIT, shim.watch())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
