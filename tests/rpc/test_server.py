"""The gRPC server around the service: its address, health, reflection, drain, and the command."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from django.conf import settings
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc  # type: ignore[import-untyped]

from gateway_app.rpc import assistant_pb2_grpc
from gateway_app.rpc.assistant_pb2 import InfoRequest, Request
from gateway_app.rpc.gateway_client import GatewayClient, loopback_origin
from gateway_app.rpc.server import AddressUnusable, RpcServer, is_loopback
from tests.conftest import free_port
from tests.fakes.gated_gateway import Exchange, GatedGateway
from tests.rpc.conftest import CHANNEL_OPTIONS

PATIENCE_S = 15.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
CHAT = Request(path="/v1/chat/completions", method="POST", body=b"{}")


async def health_of(channel: grpc.aio.Channel, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=service), wait_for_ready=True, timeout=PATIENCE_S)).status)


class Gate:
    """A gateway script: one chunk, then the rest once opened."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(b"first")
        await self.open.wait()
        await exchange.chunk(b"last")
        await exchange.end()


# --- health and reflection -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", ["", "assistant.AssistantService"])
async def test_health_says_serving(channel: grpc.aio.Channel, service: str) -> None:
    assert await health_of(channel, service) == SERVING


async def test_health_does_not_know_other_services(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health_of(channel, "assistant.Other")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_and_describes_the_service(channel: grpc.aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="assistant.AssistantService"),
    ]
    listed, described = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
    names = {service.name for service in listed.list_services_response.service}
    assert {"assistant.AssistantService", "grpc.health.v1.Health"} <= names
    assert b"ForwardRequestStream" in described.file_descriptor_response.file_descriptor_proto[0]


# --- drain ---------------------------------------------------------------------------------------------------------------


async def test_a_draining_server_finishes_its_stream_refuses_new_calls_and_says_not_serving(
    gateway: GatedGateway, server: RpcServer, channel: grpc.aio.Channel, stub: Any
) -> None:
    gateway.script = gate = Gate()
    call = stub.ForwardRequestStream(CHAT)
    await call.read()
    assert (await call.read()).body == b"first"
    draining = asyncio.create_task(server.drain(PATIENCE_S))
    await asyncio.sleep(0)  # the drain begins with its first step
    assert await health_of(channel, "") == NOT_SERVING
    assert await health_of(channel, "assistant.AssistantService") == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetInfo(InfoRequest())
    assert (caught.value.code(), caught.value.details()) == (
        grpc.StatusCode.UNAVAILABLE,
        "This server is shutting down; try again.",
    )
    assert not draining.done()
    gate.open.set()
    assert (await call.read()).body == b"last"
    assert await call.code() is grpc.StatusCode.OK
    await asyncio.wait_for(draining, PATIENCE_S)


async def test_a_drain_ends_when_its_time_is_over(gateway: GatedGateway, server: RpcServer, stub: Any) -> None:
    gateway.script = Gate()
    call = stub.ForwardRequestStream(CHAT)
    await call.read()
    assert (await call.read()).body == b"first"
    await asyncio.wait_for(server.drain(0.05), PATIENCE_S)
    await server.stop()
    await asyncio.wait_for(gateway.gone.wait(), PATIENCE_S)
    assert await asyncio.wait_for(call.code(), PATIENCE_S) is not grpc.StatusCode.OK


async def test_an_idle_server_drains_at_once_though_somebody_watches_its_health(
    server: RpcServer, channel: grpc.aio.Channel
) -> None:
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
    assert (await watch.read()).status == SERVING
    await asyncio.wait_for(server.drain(3600), PATIENCE_S)
    assert (await watch.read()).status == NOT_SERVING
    await asyncio.wait_for(server.stop(), PATIENCE_S)


# --- addresses -----------------------------------------------------------------------------------------------------------


async def test_a_taken_port_is_named_even_when_another_grpc_server_has_it(server: RpcServer) -> None:
    async with GatewayClient(loopback_origin("127.0.0.1", 1)) as client:
        with pytest.raises(
            AddressUnusable, match=rf"Cannot listen on 127\.0\.0\.1:{server.port} for gRPC: address already in use\. Stop"
        ):
            RpcServer("127.0.0.1", server.port, client, "1")


async def test_the_port_is_ours_alone(server: RpcServer) -> None:
    with socket.socket() as intruder:
        intruder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(OSError, match="in use"):
            intruder.bind(("127.0.0.1", server.port))


async def test_a_host_that_is_not_ours_is_named() -> None:
    async with GatewayClient(loopback_origin("127.0.0.1", 1)) as client:
        with pytest.raises(AddressUnusable, match=r"192\.0\.2\.1:50051 for gRPC: cannot assign requested address"):
            RpcServer("192.0.2.1", 50051, client, "1")


@pytest.mark.parametrize(
    ("address", "origin"),
    [
        (("127.0.0.1", 8080), "http://127.0.0.1:8080"),
        (("0.0.0.0", 8080), "http://127.0.0.1:8080"),
        (("::", 80), "http://[::1]"),
        (("::1", 80), "http://[::1]"),
        (("localhost", 80), "http://localhost"),
    ],
)
def test_the_gateway_is_reached_on_this_machine(address: tuple[str, int], origin: str) -> None:
    assert GatewayClient(loopback_origin(*address)).address == origin


@pytest.mark.parametrize(("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)])
def test_loopback_is_known(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


# --- the command ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def command(*arguments: str, gateway_port: int = 1) -> AsyncIterator[asyncio.subprocess.Process]:
    """`manage.py grpcserver` as a process, with its own (lean) settings."""
    environment = os.environ | {"ASSISTANT_HTTP_ADDR": f"127.0.0.1:{gateway_port}", "ASSISTANT_DRAIN_S": "3600"}
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    argv = [sys.executable, "manage.py", "grpcserver", *arguments]
    process = await asyncio.create_subprocess_exec(*argv, cwd=settings.BASE_DIR, env=environment, stderr=asyncio.subprocess.PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_the_command_serves_drains_on_term_and_a_second_term_ends_it_at_once(gateway: GatedGateway) -> None:
    gateway.script = gate = Gate()
    address = f"127.0.0.1:{free_port()}"
    async with (
        command("--addr", address, gateway_port=gateway.port) as process,
        grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel,
    ):
        stub: Any = assistant_pb2_grpc.AssistantServiceStub(channel)  # type: ignore[no-untyped-call]
        assert await health_of(channel, "") == SERVING
        assert (await stub.GetInfo(InfoRequest())).version == settings.VERSION
        call = stub.ForwardRequestStream(CHAT)
        await call.read()
        process.send_signal(signal.SIGTERM)
        while await health_of(channel, "") == SERVING:
            await asyncio.sleep(0.01)
        assert process.returncode is None
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0
        await asyncio.wait_for(gateway.gone.wait(), PATIENCE_S)
        assert not gate.open.is_set()


async def test_the_command_ends_on_ctrl_c() -> None:
    address = f"127.0.0.1:{free_port()}"
    async with command("--addr", address) as process, grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        assert await health_of(channel, "") == SERVING
        process.send_signal(signal.SIGINT)
        _, log = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert process.returncode == 0
    assert f"AssistantService on {address}, forwarding to http://127.0.0.1:1" in log.decode()


async def test_the_command_names_a_taken_port_in_one_line(server: RpcServer) -> None:
    async with command("--addr", f"127.0.0.1:{server.port}") as process:
        _, log = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert process.returncode == 1
    [line] = log.decode().splitlines()
    assert line.startswith(f"CommandError: Cannot listen on 127.0.0.1:{server.port} for gRPC: address already in use.")


async def test_the_command_loads_neither_admin_nor_rest_nor_celery() -> None:
    program = (
        "import os, sys; os.environ['DJANGO_SETTINGS_MODULE'] = 'assistant_site.settings_gateway'; import django; django.setup();"
        "import gateway_app.management.commands.grpcserver;"
        "print([name for name in ('django.contrib.admin', 'rest_framework', 'unfold', 'celery') if name in sys.modules])"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, cwd=settings.BASE_DIR, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert out == b"[]\n"
