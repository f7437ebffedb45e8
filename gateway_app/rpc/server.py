"""The gRPC server process: bind, serve, drain, stop."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from gateway_app.rpc import assistant_pb2_grpc
from gateway_app.rpc.gateway_client import GatewayClient
from gateway_app.rpc.service import MAX_MESSAGE, SERVICE, AssistantService
from gateway_app.upstream.http import Origin

MAX_CALLS = 1000  # at once; more are answered RESOURCE_EXHAUSTED
OPTIONS = (
    # gRPC's default lets two servers share a port in silence, each getting half of the calls.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
)

log = logging.getLogger(__name__)


class AddressUnusable(Exception):
    """Nothing can listen there; str() is a sentence with the remedy."""


class RpcServer:
    """One server on one address. Readiness is the health service; `stop` ends running calls after a grace."""

    def __init__(self, host: str, port: int, gateway: GatewayClient, version: str) -> None:
        self._service = AssistantService(gateway, version)
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
        self.port = _bind(self._server, host, port)
        assistant_pb2_grpc.add_AssistantServiceServicer_to_server(self._service, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> None:
        """Take calls."""
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()

    async def drain(self, grace_s: float) -> None:
        """Say NOT_SERVING, refuse new calls, and wait for the running ones; at most `grace_s` seconds."""
        self._service.drain()
        await self._health.enter_graceful_shutdown()
        try:
            async with asyncio.timeout(grace_s):
                await self._service.idle.wait()
        except TimeoutError:
            log.warning("Calls are still running after %s s; they are cut off.", grace_s)

    async def stop(self) -> None:
        """End everything now."""
        await self._server.stop(None)


async def serve(address: tuple[str, int], gateway_origin: Origin, version: str, drain_s: float) -> None:
    """Serve until TERM or Ctrl-C, then drain; a second signal ends at once. Raises AddressUnusable before anything else."""
    host, port = address
    async with GatewayClient(gateway_origin) as gateway:
        server = RpcServer(host, port, gateway, version)
        with _signals() as asked:
            await server.start()
            if not is_loopback(host):
                log.warning("gRPC listens on %s without TLS: keys and prompts cross the network in clear text.", host)
            log.info("AssistantService on %s, forwarding to %s", _authority(host, server.port), gateway.address)
            await asked.get()
            log.info("Draining for at most %s s; a second signal ends at once.", drain_s)
            draining = asyncio.create_task(server.drain(drain_s))
            again = asyncio.create_task(asked.get())
            try:
                await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                draining.cancel()
                again.cancel()
                await asyncio.gather(draining, again, return_exceptions=True)
                await server.stop()


@contextmanager
def _signals() -> Iterator[asyncio.Queue[int]]:
    """TERM and INT, in a queue."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[int] = asyncio.Queue()
    wanted = (signal.SIGTERM, signal.SIGINT)
    for number in wanted:
        loop.add_signal_handler(number, arrived.put_nowait, number)
    try:
        yield arrived
    finally:
        for number in wanted:
            loop.remove_signal_handler(number)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    """Bind and return the port (another one for 0)."""
    _try_address(host, port)
    try:
        return server.add_insecure_port(_authority(host, port))
    except RuntimeError as error:
        raise AddressUnusable(_unusable(host, port, "it was taken just now")) from error


def _try_address(host: str, port: int) -> None:
    """gRPC does not say why it cannot bind; a socket of our own does."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        raise AddressUnusable(_unusable(host, port, (error.strerror or str(error)).lower())) from error


def _unusable(host: str, port: int, reason: str) -> str:
    return (
        f"Cannot listen on {_authority(host, port)} for gRPC: {reason}. Stop the program that uses it, "
        "or choose another address with ASSISTANT_GRPC_ADDR or --addr."
    )
