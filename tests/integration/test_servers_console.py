"""The console command as a real process on its socket: Django answers, unknown WebSocket paths are closed, strangers refused."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.served import ROOT


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory, valkey: object) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("c") / "s" / "c.sock"
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "assistant_site.settings"}  # the suite's throw-away home
    arguments = [sys.executable, "manage.py", "console", "--addr", str(path)]
    with subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            log = []
            for line in process.stderr:
                log.append(line)
                if "Listening on" in line:
                    break
            assert process.poll() is None, log
            yield path
        finally:
            process.terminate()
            assert process.wait(20) == 0


@pytest.fixture
async def session(console: Path) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(console))) as client:
        yield client


async def test_django_answers_for_the_hosts_it_knows(session: aiohttp.ClientSession) -> None:
    async with session.get("http://localhost/admin/login/") as answer:
        assert answer.status == 200
        assert "csrfmiddlewaretoken" in await answer.text()
    async with session.get("http://stranger.example/admin/login/") as answer:
        assert answer.status == 400


async def test_an_unknown_websocket_path_is_closed_with_4404(session: aiohttp.ClientSession) -> None:
    async with session.ws_connect("ws://localhost/ws/nothing/", origin="http://localhost") as socket:
        message = await asyncio.wait_for(socket.receive(), 10)

    assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 4404)


async def test_a_websocket_from_another_site_is_refused(session: aiohttp.ClientSession) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
        await session.ws_connect("ws://localhost/ws/nothing/", origin="http://stranger.example")

    assert refusal.value.status == 403
