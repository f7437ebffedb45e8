"""A running AssistantService in front of a stand-in gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import grpc
import pytest

from gateway_app.rpc import assistant_pb2_grpc
from gateway_app.rpc.gateway_client import GatewayClient, loopback_origin
from gateway_app.rpc.server import RpcServer
from tests.fakes.gated_gateway import GatedGateway, gated_gateway

# Tests need no proxies, and messages as long as the server's.
CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)


@pytest.fixture
async def gateway() -> AsyncIterator[GatedGateway]:
    async with gated_gateway() as running:
        yield running


@pytest.fixture
async def server(gateway: GatedGateway) -> AsyncIterator[RpcServer]:
    async with GatewayClient(loopback_origin("127.0.0.1", gateway.port)) as client:
        running = RpcServer("127.0.0.1", 0, client, "1.2.3")
        await running.start()
        try:
            yield running
        finally:
            await running.stop()


@pytest.fixture
async def channel(server: RpcServer) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=CHANNEL_OPTIONS) as open_channel:
        yield open_channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return cast("Any", assistant_pb2_grpc.AssistantServiceStub(channel))  # type: ignore[no-untyped-call]
