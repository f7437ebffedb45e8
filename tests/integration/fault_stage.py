"""A whole platform whose engines can be told to misbehave, clients that notice everything, and a record of what was seen.

The engines are tests/fakes/llama_server.py and wasmedge.py under the real adapters, shim and tasks: what stands in is the
engine's program, nothing else.
Each fault writes one row to build/fault_matrix.json, from which the table of docs/operations.md is made.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import redis

from tests.fakes import gguf_files, llama_server, wasmedge
from tests.running_platform import ROOT, Platform, wait_until

RECORD = ROOT / "build" / "fault_matrix.json"
PATIENCE_S = 45.0


@dataclass
class Clients:
    """Threads that ask one model again and again, each answer read to its end, and what became of every request.

    ended: "ok", "cut" (the stream ended with an error event or without [DONE]), or the error code of a refusal. Times are
    seconds on the monotonic clock.
    """

    stage: Stage
    model: str
    stream: bool = True
    count: int = 4
    max_tokens: int = 20
    ended: Counter[str] = field(default_factory=Counter)
    oks: list[tuple[float, float]] = field(default_factory=list)  # (begun, ended)
    waits: list[float] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def running(self) -> Iterator[Clients]:
        threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(self.count)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(90)
            assert not any(thread.is_alive() for thread in threads), "a request hangs"

    def recovered_s(self, since: float) -> float:
        """Seconds from then until the first request that was begun afterwards had been answered whole."""
        ended: float = wait_until(
            lambda: next((end for begun, end in list(self.oks) if begun > since), None), PATIENCE_S, "an answer"
        )
        return ended - since

    @property
    def lost(self) -> int:
        return sum(number for how, number in self.ended.items() if how != "ok")

    def _ask(self) -> None:
        with httpx.Client(timeout=90) as client:
            while not self._stop.is_set():
                began = time.monotonic()
                how, detail = self.stage.ask(self.model, self.stream, self.max_tokens, client)
                with self._lock:
                    self.ended[how] += 1
                    self.waits.append(time.monotonic() - began)
                    if how == "ok":
                        self.oks.append((began, time.monotonic()))
                    else:
                        self.details.append(detail)


class Stage:
    """One platform for a number of faults."""

    def __init__(self, folder: Path, server: str = "daphne", **extra: str) -> None:
        self.program = llama_server.install(folder / "bin")
        self.wasmedge = wasmedge.install(folder / "wasmedge")
        settings = {
            "ASSISTANT_DEMO_MODEL": "0",
            "ASSISTANT_LLAMA_SERVER": str(self.program),
            "ASSISTANT_WASMEDGE": str(self.wasmedge.program),
            "ASSISTANT_WASM_FILE": str(self.wasmedge.wasm),
            "ASSISTANT_WASM_SHA256": self.wasmedge.sha256,
            **extra,
        }
        self.platform = Platform(folder / "h", server=server, extra=settings)
        self.admin_key = ""

    def start(self) -> None:
        self.platform.start()
        if not self.admin_key:
            made = self.platform.command(
                "create_api_key", "--user", "admin", "--name", "ops", "--scope", "admin", "--scope", "inference"
            )
            assert made.returncode == 0, made.stderr
            self.admin_key = made.stdout.strip()

    def close(self) -> None:
        assert self.platform.stop(40) == 0, self.platform.output[-4000:]
        assert self.platform.processes() == []

    # Models and instances, through REST

    def api(self, method: str, path: str, body: Any = None, expected: int | tuple[int, ...] = (200, 201, 202, 204)) -> Any:
        answer = httpx.request(
            method,
            f"{self.platform.base_url}/api/v1/{path}",
            json=body,
            headers={"authorization": f"Bearer {self.admin_key}"},
            timeout=30,
        )
        allowed = (expected,) if isinstance(expected, int) else expected
        assert answer.status_code in allowed, (answer.status_code, answer.text)
        return answer.json() if answer.content else None

    def file(self, name: str) -> Path:
        folder = self.platform.home / "models"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.gguf"

    def script(self, name: str, **behaviour: Any) -> None:
        """How the next process of this model behaves; see tests/fakes/llama_server.py."""
        Path(f"{self.file(name)}.json").write_text(json.dumps(behaviour))

    def model(self, name: str, behaviour: dict[str, Any] | None = None, file: Path | None = None, **fields: Any) -> int:
        """A model on the stand-in; its id."""
        self.script(name, **(behaviour or {}))
        if file is None:
            gguf_files.llama(self.file(name))
        body = {"name": name, "engine": "llama-server", "chat_model_path": f"{name}.gguf", "slots": 4, "ctx_size": 256, **fields}
        return int(self.api("POST", "models/", body)["id"])

    def ready_model(self, name: str, behaviour: dict[str, Any] | None = None, **fields: Any) -> int:
        number = self.model(name, behaviour, **fields)
        self.wait(name, "READY")
        return number

    def remove(self, name: str) -> None:
        """Delete the model and wait until its processes are gone."""
        found = [one for one in self.api("GET", f"models/?name={name}")["results"] if one["name"] == name]
        for one in found:
            self.api("DELETE", f"models/{one['id']}/")
        wait_until(lambda: not self.instances(name), PATIENCE_S, f"the end of {name}")

    def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """Read past everything, from the database itself (SQLite only)."""
        database = sqlite3.connect(f"file:{self.platform.home}/assistant.sqlite3?mode=ro", uri=True, timeout=10)
        database.row_factory = sqlite3.Row
        try:
            return [dict(row) for row in database.execute(query, values)]
        finally:
            database.close()

    def instances(self, name: str) -> list[dict[str, Any]]:
        """Those that have not ended, newest first."""
        return self.rows("SELECT * FROM models_app_instance WHERE model_name = ? AND state != 'STOPPED' ORDER BY id DESC", name)

    def instance(self, name: str) -> dict[str, Any]:
        (one,) = self.instances(name)
        return one

    def wait(self, name: str, *states: str, seconds: float = PATIENCE_S) -> dict[str, Any]:
        """The newest instance of the model once it is in one of these states."""

        def look() -> dict[str, Any] | None:
            found = self.instances(name)
            return found[0] if found and found[0]["state"] in states else None

        try:
            arrived: dict[str, Any] = wait_until(look, seconds, f"{name} to be {' or '.join(states)}")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.instances(name)}\n{self.platform.output[-3000:]}") from None
        return arrived

    def incidents(self, name: str) -> list[dict[str, Any]]:
        return self.rows("SELECT * FROM models_app_incident WHERE model_name = ? ORDER BY id DESC", name)

    def first_incident(self, name: str) -> dict[str, Any]:
        """The model's first failure. Its state would be gone at once: the first restart is immediate."""
        seen: dict[str, Any] = wait_until(lambda: self.incidents(name), PATIENCE_S, f"an incident of {name}")[-1]
        return seen

    # Requests

    def ask(
        self, model: str, stream: bool = True, max_tokens: int = 20, client: httpx.Client | None = None, **headers: str
    ) -> tuple[str, str]:
        """One request, read to its end: ("ok" | "cut" | error code, detail)."""
        if client is None:
            with httpx.Client(timeout=150) as own:
                return self.ask(model, stream, max_tokens, own, **headers)
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": max_tokens, "stream": stream}
        url = f"{self.platform.base_url}/v1/chat/completions"
        try:
            answer = client.post(url, json=body, headers={"authorization": f"Bearer {self.admin_key}", **headers})
        except httpx.HTTPError as error:
            return "cut", type(error).__name__
        if answer.status_code != 200:
            return str(answer.json()["error"]["code"]), answer.text
        if stream and "data: [DONE]" not in answer.text:
            return "cut", answer.text[-300:]
        return "ok", ""

    # Processes

    def process(self, row: dict[str, Any], which: str = "pid") -> psutil.Process:
        return psutil.Process(row[which])

    def program_of(self, *words: str) -> psutil.Process:
        """The platform's own process with these words on its command line."""
        return min(self.platform.processes(*words), key=lambda process: process.create_time())

    def engines(self) -> list[psutil.Process]:
        """Every engine process of this home that lives."""
        found = []
        for process in self.platform.processes(str(self.program)):
            with suppress(psutil.NoSuchProcess):  # it may end while it is looked at
                if "shim" not in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def orphans(self) -> list[int]:
        """Engines that no row accounts for."""
        known = {row["pid"] for row in self.rows("SELECT pid FROM models_app_instance WHERE state NOT IN ('STOPPED', 'FAILED')")}
        return [one.pid for one in self.engines() if one.pid not in known]

    def settled(self) -> None:
        """Nothing is left that no row accounts for; a process may take a moment to go."""
        wait_until(lambda: not self.orphans(), 15, f"the end of strays {self.orphans()}")

    def write(self, statement: str, *values: Any) -> None:
        """Change a row behind the platform's back."""
        database = sqlite3.connect(self.platform.home / "assistant.sqlite3", timeout=20)
        try:
            with database:
                database.execute(statement, values)
        finally:
            database.close()

    def valkey(self) -> redis.Redis:
        """The platform's own."""
        password = (self.platform.home / "secrets" / "valkey_password").read_text().strip()
        return redis.Redis(unix_socket_path=str(self.platform.home / "run" / "valkey.sock"), password=password)

    def record(self, fault: str, clients: Clients | None, recovery_s: float | None, saw: str, rest: str) -> None:
        """One row of the matrix, once nothing is left that no row accounts for."""
        self.settled()
        self.record_row(fault, clients, recovery_s, saw, rest)

    def record_row(self, fault: str, clients: Clients | None, recovery_s: float | None, saw: str, rest: str) -> None:
        """One row of the matrix."""
        row = {
            "fault": fault,
            "client_saw": saw,
            "recovery_s": None if recovery_s is None else round(recovery_s, 1),
            "lost": None if clients is None else clients.lost,
            "answered": None if clients is None else clients.ended["ok"],
            "rest": rest,
        }
        RECORD.parent.mkdir(exist_ok=True)
        rows = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        RECORD.write_text(json.dumps({**rows, fault: row}, indent=1))
