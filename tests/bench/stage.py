"""What is measured and what it needs, as processes over a throw-away home; each ends with its block, and with us.

With more than one core the measured one runs alone on core 0, and everything that makes or takes its load on core 1.
"""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import psutil

from assistant_site import child_exec
from tests.bench.load import HOST, MODELS, Target
from tests.bench.upstream import EVENTS

ROOT: Final = Path(__file__).resolve().parent.parent.parent
READY_S: Final = 30.0
STOP_S: Final = 10.0
CORES: Final = sorted(os.sched_getaffinity(0))  # before pin_ourselves()
MEASURED: Final = CORES[0]
LOAD: Final = CORES[-1] if len(CORES) < 3 else CORES[1]
PINNED: Final = len(CORES) > 1 and shutil.which("taskset") is not None
NGINX: Final = shutil.which("nginx") is not None


class NotStarted(Exception):
    """A process did not come up; str() holds its last words."""


def pin_ourselves() -> None:
    """This process makes the load, so it runs where the load runs."""
    if PINNED:
        os.sched_setaffinity(0, {LOAD})


@dataclass(frozen=True)
class Running:
    """One process of ours."""

    name: str
    process: psutil.Process

    def rss_mb(self) -> float:
        """Resident memory."""
        return float(self.process.memory_info().rss) / 1e6

    def cpu_s(self) -> float:
        """CPU time used so far, in user and system mode, by all threads and by worker processes."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(float(times.user + times.system) for times in (member.cpu_times() for member in family))

    @contextmanager
    def free_to_move(self) -> Iterator[None]:
        """Let the kernel place this process and the load as it would in use: with more busy processes than pinned ones, being
        pinned beside one of them is what would be measured.
        """
        pinned = {pid: os.sched_getaffinity(pid) for pid in (0, self.process.pid)}
        for pid in pinned:
            os.sched_setaffinity(pid, CORES)
        try:
            yield
        finally:
            for pid, cores in pinned.items():
                os.sched_setaffinity(pid, cores)


class Stage:
    """Starts processes. home: private folder for logs; env: of every process."""

    def __init__(self, home: Path, env: dict[str, str]) -> None:
        self._home = home
        self._env = env

    @contextmanager
    def upstream(self, port: int) -> Iterator[Running]:
        """The stand-in engine."""
        argv = [sys.executable, "-m", "tests.bench.upstream", str(port)]
        with self._running("upstream", argv, [LOAD]) as running:
            self.await_answers(Target(port), running)
            yield running

    @contextmanager
    def console(self, socket: Path) -> Iterator[Running]:
        """Admin and pages, on no core of its own: as in production, the kernel says where."""
        argv = [sys.executable, "manage.py", "console"]
        with self._running("console", argv, CORES) as running:
            self._until(socket.exists, running)
            yield running

    @contextmanager
    def gateway(self, server: str, target: Target, *, engine_answers: bool = True) -> Iterator[Running]:
        """The gateway on one of its servers; ready when it relays, or only listens where no engine may answer yet."""
        argv = [sys.executable, "manage.py", "gateway", "--addr", f"{HOST}:{target.port}", "--server", server]
        with self._running(f"gateway-{server}", argv, [MEASURED]) as running:
            self._until(lambda: _asked(replace(target, path=MODELS, get=True)), running)
            if engine_answers:
                self.await_answers(target, running)
            yield running

    @contextmanager
    def nginx(self, target: Target, upstream_port: int) -> Iterator[Running]:
        """A plain proxy before the same upstream, to compare with: one worker, no buffering, connections kept."""
        folder = self._home / "nginx"
        folder.mkdir(mode=0o700, exist_ok=True)
        file = folder / "nginx.conf"
        file.write_text(nginx_configuration(folder, target.port, upstream_port))
        argv = ["nginx", "-e", str(folder / "error.log"), "-c", str(file)]
        with self._running("nginx", argv, [MEASURED]) as running:
            self.await_answers(target, running)
            yield running

    def await_answers(self, target: Target, running: Running) -> None:
        """Until it gives a whole answer and a whole stream. Raises NotStarted."""
        self._until(lambda: b'"choices"' in _asked(target), running)
        text = _asked(target, stream=True)
        if text.count(b'"content":"') < EVENTS or b"[DONE]" not in text:
            raise NotStarted(f"{running.name} does not relay a stream whole:\n{text[-500:].decode(errors='replace')}")

    def _until(self, condition: Callable[[], object], running: Running) -> None:
        deadline = time.monotonic() + READY_S
        while not condition():
            if not running.process.is_running() or running.process.status() == psutil.STATUS_ZOMBIE:
                raise NotStarted(f"{running.name} ended:\n{self._last_words(running.name)}")
            if time.monotonic() > deadline:
                raise NotStarted(f"{running.name} is not ready after {READY_S:.0f} s:\n{self._last_words(running.name)}")
            time.sleep(0.05)

    def _last_words(self, name: str) -> str:
        return self._log(name).read_text(errors="replace")[-2000:]

    def _log(self, name: str) -> Path:
        return self._home / f"{name}.log"

    @contextmanager
    def _running(self, name: str, argv: Sequence[str], cores: Sequence[int]) -> Iterator[Running]:
        pinned = ["taskset", "-c", ",".join(map(str, cores))] if PINNED else []
        guard = [sys.executable, "-I", "-S", child_exec.__file__, str(os.getpid()), str(int(signal.SIGKILL))]
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(
                [*guard, *pinned, *argv], cwd=ROOT, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            yield Running(name, psutil.Process(process.pid))
        finally:
            _end(process)


def _asked(target: Target, *, stream: bool = False) -> bytes:
    """The body of a 200; nothing for any other status, or where nobody listens yet."""
    connection = http.client.HTTPConnection(HOST, target.port, timeout=READY_S)
    try:
        connection.request("GET" if target.get else "POST", target.path, target.body(stream) or None, target.headers())
        answer = connection.getresponse()
        body = answer.read()
        return body if answer.status == 200 else b""
    except (OSError, http.client.HTTPException):
        return b""
    finally:
        connection.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def nginx_configuration(folder: Path, port: int, upstream_port: int) -> str:
    """Everything it writes goes to our folder, so it needs no rights of its own."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"  {kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    return f"""worker_processes 1;
daemon off;
pid {folder}/pid;
events {{ worker_connections 4096; }}
http {{
  access_log off;
{places}  upstream engine {{ server {HOST}:{upstream_port}; keepalive 256; }}
  server {{
    listen {HOST}:{port};
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""
