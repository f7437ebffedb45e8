"""The doctor at a running platform, and streams through both servers with and without a proxy that buffers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from models_app.doctor import streaming
from models_app.doctor.finding import Context, Finding
from tests.conftest import free_port
from tests.running_platform import ROOT, Platform, wait_until


@pytest.fixture(scope="module", params=["daphne", "uvicorn"])
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real `manage.py gateway` on an empty installation, without broker and console; gives its base URL."""
    home, port = tmp_path_factory.mktemp("g"), free_port()
    environment = {
        **os.environ,
        "ASSISTANT_HOME": str(home),
        "ASSISTANT_HTTP_ADDR": f"127.0.0.1:{port}",
        "ASSISTANT_ASGI_SERVER": request.param,
    }
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    subprocess.run([sys.executable, "manage.py", "migrate", "-v", "0"], cwd=ROOT, env=environment, check=True)
    with (home / "gateway.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "manage.py", "gateway"], cwd=ROOT, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(url), 30, "the gateway")
        yield url
    finally:
        process.terminate()
        assert process.wait(20) == 0


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def buffering_proxy(upstream: str) -> Iterator[str]:
    """Stands in for a reverse proxy with response buffering: reads each answer whole before it passes it on."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            reply = httpx.get(upstream + self.path, trust_env=False)
            self.send_response(reply.status_code)
            self.send_header("content-type", reply.headers["content-type"])
            self.send_header("content-length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def look(url: str, monkeypatch: pytest.MonkeyPatch) -> Finding:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (finding,) = streaming.check(Context(public_url=url, running=True))
    return finding


def test_a_direct_stream_comes_event_by_event(gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = look(gateway, monkeypatch)
    assert (found.level, "event by event" in found.text) == ("ok", True), found


def test_a_proxy_that_buffers_is_found(gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with buffering_proxy(gateway) as url:
        found = look(url, monkeypatch)
    assert (found.level, "buffers" in found.text, "proxy_buffering off" in found.remedy) == ("fail", True, True), found


def test_something_else_behind_the_public_url_is_told_apart(gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = look(f"{gateway}/v1/models?x=", monkeypatch)
    assert (found.level, "its status is 401" in found.text) == ("fail", True), found
    assert look(f"http://127.0.0.1:{free_port()}", monkeypatch).level == "fail"


@pytest.mark.platform
def test_a_running_platform_is_well(platform: Platform) -> None:
    done = platform.command("doctor", "--json")
    told = json.loads(done.stdout)
    unwell = [finding for finding in told["findings"] if finding["level"] == "fail"]
    assert (done.returncode, unwell) == (0, []), unwell
    by_check = {finding["check"]: finding for finding in told["findings"]}
    for check in ("platform", "database", "broker", "models", "nodes", "workers", "gateways", "usage", "streaming"):
        assert by_check[check]["level"] == "ok", by_check[check]


@pytest.mark.platform
def test_the_doctor_changes_nothing(platform: Platform) -> None:
    def files() -> set[Path]:
        watched = ("secrets", "models", "run", "instances")
        return {path for name in watched for path in (platform.home / name).rglob("*") if path.name != "engine.log"}

    before = files()
    platform.command("doctor")
    assert files() == before
