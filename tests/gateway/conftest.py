"""A real gateway over real rows, served by a real uvicorn in the test's own event loop; engines are scripted upstreams."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from django.contrib.auth.models import User
from django.db import connections
from redis.asyncio import Redis

from assistant_site import deadlines
from assistant_site.uvicorn_server import UvicornServer
from assistant_site.valkey import Valkey
from gateway_app.endpoints.http import Receive, Scope, Send
from gateway_app.endpoints.relay import Patience
from gateway_app.gateway import Gateway, GatewayConfig
from models_app.contracts import key_material, secret_box
from models_app.contracts.coordination import GatewayTelemetry, telemetry_key
from models_app.models import APIKey, Instance, ModelConfig, Node, RemoteServer, State
from tests.fakes.scripted_upstream import Script, ScriptedUpstream

SECRET = "installation-secret-of-the-tests"
ENGINE_SECRET = "engine-secret-that-nobody-may-see"
HOST = "127.0.0.1"
_T = TypeVar("_T")


async def in_database(work: Callable[[], _T]) -> _T:
    """Run ORM code in a thread of its own and close that thread's connection."""

    def run() -> _T:
        try:
            return work()
        finally:
            connections.close_all()

    return await asyncio.to_thread(run)


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that changes on this event loop; the test's time-out bounds it."""
    while not condition():
        await asyncio.sleep(0.005)


class Cast:
    """Makes rows. Only inside in_database, or in a test without an event loop."""

    def user(self, name: str = "alice") -> User:
        return User.objects.get_or_create(username=name)[0]

    def key(self, name: str = "key", *, user: str = "alice", **fields: Any) -> tuple[str, APIKey]:
        made = key_material.generate()
        row = APIKey.objects.create(user=self.user(user), name=name, public_id=made.public_id, digest=made.digest, **fields)
        return made.text, row

    def model(self, name: str = "tiny", **fields: Any) -> ModelConfig:
        return ModelConfig.objects.create(name=name, chat_model_path="/models/tiny.gguf", **fields)

    def instance(self, model: ModelConfig, port: int | None, state: str = State.READY, **fields: Any) -> Instance:
        node = Node.objects.get_or_create(name="local", defaults={"address": HOST})[0]
        values = {
            "model": model, "model_name": model.name, "node": node, "engine": model.engine, "state": state, "generation": 1,
            "slots": model.slots, "port": port, "pid": 4242, "engine_secret": secret_box.seal(SECRET, ENGINE_SECRET),
        }  # fmt: skip
        return Instance.objects.create(**{**values, **fields})

    def remote(self, url: str, models: dict[str, str], **fields: Any) -> RemoteServer:
        fields.setdefault("name", f"remote-{RemoteServer.objects.count()}")
        return RemoteServer.objects.create(address=url, models=models, **fields)


class NoConsole:
    """Everything that is not the data plane's: says what it was asked for."""

    async def start(self) -> None:
        """Nothing to start."""

    async def stop(self) -> None:
        """Nothing to stop."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": b"console:" + scope["path"].encode()})


class Served:
    """A gateway that answers on loopback."""

    def __init__(self, gateway: Gateway, port: int, client: httpx.AsyncClient, spool: Path) -> None:
        self.gateway = gateway
        self.port = port
        self.client = client
        self.spool = spool
        self.key = ""

    def headers(self, key: str | None = None) -> dict[str, str]:
        return {"authorization": f"Bearer {key or self.key}"}

    async def get(self, path: str, **options: Any) -> httpx.Response:
        options.setdefault("headers", self.headers())
        return await self.client.get(path, **options)

    async def chat(self, model: str = "tiny", *, key: str | None = None, headers: Any = (), **fields: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.client.post("/v1/chat/completions", json=body, headers={**self.headers(key), **dict(headers)})

    async def open_chat(self, model: str = "tiny", **fields: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A chat over a socket of the test's own, to be read, closed or left alone as the test likes."""
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {self.key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection(HOST, self.port)
        writer.write(head.encode() + body)
        await writer.drain()
        return reader, writer

    def events(self) -> list[dict[str, Any]]:
        """Everything in the spool, in order."""
        files = sorted(self.spool.glob("*.jsonl")) + sorted(self.spool.glob("*.open"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def ends(self) -> list[dict[str, Any]]:
        return [event for event in self.events() if event["t"] == "end"]

    def count_ends(self) -> int:
        """How many requests have ended."""
        return sum(file.read_bytes().count(b'{"t":"end",') for file in self.spool.iterdir())

    def idle(self) -> bool:
        """Whether nothing is held by any request."""
        backends = self.gateway.directory.backends.values()
        return not any(backend.in_flight for backend in backends) and not self.gateway.slots.waiting


Serve = Callable[..., Awaitable[Served]]


def config(spool: Path, redis_url: str, **changes: Any) -> GatewayConfig:
    base = GatewayConfig(
        node="test",
        redis_url=redis_url,
        installation_secret=SECRET,
        console_socket=spool.parent / "console.sock",
        spool_dir=spool,
        max_body=1024 * 1024,
        max_wait_s=20.0,
        patience=Patience(),
    )
    return replace(base, **changes)


@asynccontextmanager
async def served(gateway: Gateway, spool: Path) -> AsyncIterator[Served]:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        port = listener.getsockname()[1]
        server = UvicornServer(gateway.application, deadlines.DEFAULT)
        try:
            await gateway.start()
            await server.start(listener)
            try:
                async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}", timeout=30) as client:
                    yield Served(gateway, port, client, spool)
            finally:
                cut = asyncio.Event()
                cut.set()
                await server.drain(0, cut)
        finally:
            await gateway.stop()


@pytest.fixture
def cast(transactional_db: None) -> Cast:
    return Cast()


@pytest.fixture
async def serve(cast: Cast, tmp_path: Path) -> AsyncIterator[Serve]:
    """Starts a gateway on the rows there are, with a key of its own. Valkey is away unless redis_url says otherwise."""
    async with AsyncExitStack() as stack:

        async def start(*, redis_url: str = "", key: dict[str, Any] | None = None, **changes: Any) -> Served:
            text, _ = await in_database(lambda: cast.key(f"served-{APIKey.objects.count()}", **(key or {})))
            spool = tmp_path / "spool"
            gateway = Gateway(config(spool, redis_url or f"unix://{tmp_path}/no.sock", **changes), NoConsole())
            running = await stack.enter_async_context(served(gateway, spool))
            running.key = text
            return running

        yield start


Engine = Callable[[Script], Awaitable[ScriptedUpstream]]


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    """Starts scripted engines that end with the test."""
    async with AsyncExitStack() as stack:

        async def start(script: Script) -> ScriptedUpstream:
            return await stack.enter_async_context(ScriptedUpstream(script))

        yield start


@pytest.fixture
def broker() -> Iterator[Valkey]:
    """One of the test's own, not running; its socket's path must be short."""
    with tempfile.TemporaryDirectory(prefix="vk-") as folder:
        yield Valkey(Path(folder) / "data", Path(folder) / "v.sock", "pw")


def broker_url(broker: Valkey) -> str:
    return f"unix://:{broker.password}@{broker.socket}?db=0"


@pytest.fixture
async def live(broker: Valkey) -> AsyncIterator[Redis]:
    """The broker running, and a client of it."""
    with broker.running():
        client = Redis.from_url(broker_url(broker), decode_responses=True)
        yield client
        await client.aclose()


async def telemetry(gateway: Served, live: Redis) -> GatewayTelemetry:
    """What the gateway last said."""
    found: GatewayTelemetry = json.loads(await live.get(telemetry_key(gateway.gateway.id)) or "")
    return found
