"""Closed-loop load: so many connections, each sending its next request when the last answer is whole.

`wrk` where it is installed, else a generator of our own, which is slower itself: it says who was measured with.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import Final, cast

import uvloop

HOST: Final = "127.0.0.1"
CHAT: Final = "/v1/chat/completions"
MODELS: Final = "/v1/models"
STREAM_END: Final = b"0\r\n\r\n"
# What wrk is to say at its end, in numbers; latencies and the duration in microseconds.
_WRK_DONE: Final = """
done = function(summary, latency, requests)
  local lost = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  io.write(string.format("\\nresult %d %d %d %d %d\\n", summary.requests, summary.duration, latency:percentile(50),
    latency:percentile(99), summary.errors.status + lost))
end
"""


class LoadFailed(Exception):
    """The load could not be made; str() says why."""


@dataclass(frozen=True)
class Target:
    """Whom to ask. path: before /chat/completions, with /v1."""

    port: int
    key: str = ""
    model: str = "m"
    path: str = CHAT
    get: bool = False

    def body(self, stream: bool) -> bytes:
        """A small chat; nothing for a GET."""
        call = {"model": self.model, "messages": [{"role": "user", "content": "hi"}], **({"stream": True} if stream else {})}
        return b"" if self.get else json.dumps(call).encode()

    def headers(self) -> dict[str, str]:
        authorization = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return authorization if self.get else {"Content-Type": "application/json", **authorization}

    def request(self, stream: bool) -> bytes:
        """The whole request as it goes over the wire."""
        body = self.body(stream)
        head = {"Host": f"{HOST}:{self.port}", **self.headers(), **({} if self.get else {"Content-Length": str(len(body))})}
        lines = [f"{'GET' if self.get else 'POST'} {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass(frozen=True)
class Rate:
    """What one run gave. bad: answers that were not 200, and lost connections."""

    per_s: float
    p50_ms: float
    p99_ms: float
    requests: int
    bad: int


def percentile(values: list[float], share: float) -> float:
    """The value below which this share lies; nan for none."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else float("nan")


def generator() -> str:
    """Who makes the load on this machine."""
    return "wrk" if shutil.which("wrk") else "tests.bench.load (wrk is not installed)"


def closed_loop(target: Target, *, stream: bool, connections: int, seconds: float) -> Rate:
    """One run from this process's own core. Raises LoadFailed."""
    if shutil.which("wrk"):
        return _wrk(target, stream, connections, seconds)
    return uvloop.run(_own(target, stream, connections, seconds))


def _wrk(target: Target, stream: bool, connections: int, seconds: float) -> Rate:
    script = [f"wrk.method = {json.dumps('GET' if target.get else 'POST')}"]
    script += [f"wrk.headers[{json.dumps(name)}] = {json.dumps(value)}" for name, value in target.headers().items()]
    if not target.get:
        script.append(f"wrk.body = {json.dumps(target.body(stream).decode())}")
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write("\n".join([*script, _WRK_DONE]))
        file.flush()
        done = subprocess.run(
            ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "-s", file.name,
             f"http://{HOST}:{target.port}{target.path}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("result ")]
    if done.returncode or not found:
        raise LoadFailed(f"wrk failed: {(done.stderr or done.stdout).strip()[-500:]}")
    requests, took, median, high, bad = map(int, found[0])
    return Rate(requests / (took / 1e6), median / 1e3, high / 1e3, requests, bad)


class _Caller(asyncio.Protocol):
    """One connection of the closed loop. Answers are whole at their Content-Length or at the last chunk."""

    def __init__(self, request: bytes, until: float, taken_ms: list[float]) -> None:
        self.over: asyncio.Future[bool] = asyncio.get_running_loop().create_future()  # whether all went well
        self._request = request
        self._until = until
        self._taken_ms = taken_ms
        self._answer = b""
        self._length: int | None = None  # of the whole answer, as far as its head told

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def _send(self) -> None:
        self._answer, self._length = b"", None
        self._began = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if self._length is None:
            end = self._answer.find(b"\r\n\r\n")
            if end < 0:
                return
            _, named, value = self._answer[:end].lower().partition(b"content-length:")
            self._length = end + 4 + int(value.split(b"\r\n", 1)[0]) if named else 0
        if len(self._answer) >= self._length if self._length else self._answer.endswith(STREAM_END):
            self._taken_ms.append((time.perf_counter() - self._began) * 1e3)
            self._next()

    def _next(self) -> None:
        if b" 200 " not in self._answer[:20]:
            self._finish(False)
        elif time.perf_counter() >= self._until:
            self._finish(True)
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(False)

    def _finish(self, well: bool) -> None:
        if not self.over.done():
            self.over.set_result(well)
            self._transport.close()


async def _own(target: Target, stream: bool, connections: int, seconds: float) -> Rate:
    taken_ms: list[float] = []
    began = time.perf_counter()
    loop = asyncio.get_running_loop()
    try:
        opened = [
            await loop.create_connection(lambda: _Caller(target.request(stream), began + seconds, taken_ms), HOST, target.port)
            for _ in range(connections)
        ]
    except OSError as error:
        raise LoadFailed(f"port {target.port} cannot be reached: {error}") from error
    ends = await asyncio.gather(*(caller.over for _, caller in opened))
    took = time.perf_counter() - began
    return Rate(len(taken_ms) / took, percentile(taken_ms, 0.5), percentile(taken_ms, 0.99), len(taken_ms), ends.count(False))
