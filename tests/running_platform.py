"""Start the whole platform as a user does, and take it down again; used by the end-to-end tests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.conftest import free_port

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2-135m-instruct"
START_S = 120.0


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The condition's first true value; AssertionError naming `what` after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:.0f} s for {what}")


@dataclass
class Platform:
    """One `manage.py up` over a home of its own. All processes of that home can be listed."""

    home: Path
    server: str = "daphne"
    extra: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()  # of `up`
    http_port: int = field(default_factory=free_port)
    grpc_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def key(self) -> str:
        return (self.home / "secrets" / "quickstart_key").read_text().strip()

    @property
    def admin_password(self) -> str:
        return (self.home / "secrets" / "admin_password").read_text().strip()

    @property
    def output(self) -> str:
        return (self.home.parent / "up.log").read_text(errors="replace")

    def environment(self) -> dict[str, str]:
        unwanted = {"REDIS_URL", "DJANGO_SETTINGS_MODULE"}
        return {
            **{name: value for name, value in os.environ.items() if name not in unwanted},
            "ASSISTANT_HOME": str(self.home),
            "ASSISTANT_HTTP_ADDR": f"127.0.0.1:{self.http_port}",
            "ASSISTANT_GRPC_ADDR": f"127.0.0.1:{self.grpc_port}",
            "ASSISTANT_ASGI_SERVER": self.server,
            "ASSISTANT_DRAIN_S": "5",
            **self.extra,
        }

    def start(self, model: Path | None = None) -> None:
        """Start `up` and wait until it says it is ready. The model file is laid where the download would put it."""
        if model is not None:
            folder = self.home / "models"
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / model.name).exists():
                shutil.copy(model, folder / model.name)
        with (self.home.parent / "up.log").open("ab") as log:
            seen = self.output.count("Assistant is ready")
            self.process = subprocess.Popen(
                [sys.executable, "manage.py", "up", *self.options],
                cwd=ROOT,
                env=self.environment(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        wait_until(lambda: self.output.count("Assistant is ready") > seen or self._died(), START_S, "the ready block")

    def _died(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            raise AssertionError(f"up ended with {self.process.returncode}:\n{self.output[-6000:]}")
        return False

    def stop(self, seconds: float = 20.0) -> int:
        """TERM, and the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def command(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run a manage.py command on this home."""
        return subprocess.run(
            [sys.executable, "manage.py", *args], cwd=ROOT, env=self.environment(), capture_output=True, text=True, check=False
        )

    def processes(self, *words: str) -> list[psutil.Process]:
        """Every live process started on this home whose command line holds all the words."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("ASSISTANT_HOME") == str(self.home) or str(self.home) in " ".join(process.cmdline())
                line = " ".join(process.cmdline())
                if mine and process.status() != psutil.STATUS_ZOMBIE and all(word in line for word in words):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def engine(self) -> psutil.Process:
        """The one engine process (neither its shim nor its exec helper)."""
        engines = [process for process in self.processes("embedded_server") if "shim" not in " ".join(process.cmdline())]
        assert len(engines) == 1, engines
        return engines[0]

    def chat(self, stream: bool = False, key: str | None = None, **body: Any) -> httpx.Response:
        """One chat completion, read whole."""
        payload = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Say hi."}],
            "max_tokens": 8,
            "stream": stream,
            **body,
        }
        return httpx.post(
            f"{self.base_url}/v1/chat/completions",
            json=payload,
            headers={"authorization": f"Bearer {self.key if key is None else key}"},
            timeout=60,
        )
