"""AssistantService: every call becomes one HTTP request to the gateway, under the caller's own key.

HTTP errors travel inside the Response; a gRPC error says that there is no HTTP answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc

from gateway_app.rpc import assistant_pb2, assistant_pb2_grpc
from gateway_app.rpc.forwarding import HttpRequest, Refused, answer_headers, http_request, key_of
from gateway_app.rpc.gateway_client import GatewayClient
from models_app.contracts.traits import CHAT, COMPLETIONS

SERVICE = assistant_pb2.DESCRIPTOR.services_by_name["AssistantService"].full_name
MAX_MESSAGE = 33 * 1024 * 1024  # bytes, both ways
MAX_BODY = MAX_MESSAGE - 1024 * 1024  # bytes; the rest of a message is for status and headers
ENDPOINTS = (CHAT, COMPLETIONS, "/v1/models", "/v1/models/{id}")

Context = grpc.aio.ServicerContext[Any, Any]


class AssistantService(assistant_pb2_grpc.AssistantServiceServicer):
    """`drain()` refuses new calls; `idle` is set while no call runs."""

    def __init__(self, gateway: GatewayClient, version: str) -> None:
        self.idle = asyncio.Event()
        self.idle.set()
        self._gateway = gateway
        self._version = version
        self._running = 0
        self._draining = False

    def drain(self) -> None:
        """From now on answer new calls with UNAVAILABLE; those that run go on."""
        self._draining = True

    async def ForwardRequest(self, request: assistant_pb2.Request, context: Context) -> assistant_pb2.Response:
        """The whole answer in one message."""
        async with self._call(context):
            async with self._gateway.answer(_forwarded(request, context)) as answer:
                body = await answer.read(MAX_BODY)
            return assistant_pb2.Response(status=answer.status, headers=answer_headers(answer.headers), body=body)

    async def ForwardRequestStream(self, request: assistant_pb2.Request, context: Context) -> None:
        """Status and headers as soon as they are known, then body bytes as they come.

        write() waits while the client's flow-control window is full; then nothing more is read from the gateway.
        """
        async with self._call(context), self._gateway.answer(_forwarded(request, context)) as answer:
            await context.write(assistant_pb2.Response(status=answer.status, headers=answer_headers(answer.headers)))
            async for chunk in answer.chunks():
                await context.write(assistant_pb2.Response(body=chunk))

    async def GetInfo(self, request: assistant_pb2.InfoRequest, context: Context) -> assistant_pb2.InfoResponse:
        """Version and endpoints for everybody; models for who shows a key in the metadata."""
        async with self._call(context):
            key = key_of(context.invocation_metadata() or ())
            models = await self._models(key) if key else []
            return assistant_pb2.InfoResponse(version=self._version, models=models, endpoints=ENDPOINTS)

    async def _models(self, key: str) -> list[str]:
        async with self._gateway.answer(HttpRequest("GET", "/v1/models", {"authorization": key}, b"")) as answer:
            body = await answer.read(MAX_BODY)
        if answer.status == 401:
            raise Refused(grpc.StatusCode.UNAUTHENTICATED, "The gateway does not accept this API key.")
        if answer.status != 200:
            raise Refused(grpc.StatusCode.UNAVAILABLE, f"The gateway answered {answer.status} to /v1/models; try again.")
        try:
            return [model["id"] for model in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(grpc.StatusCode.INTERNAL, "What answers at the gateway's address is no Assistant gateway.") from error

    @asynccontextmanager
    async def _call(self, context: Context) -> AsyncIterator[None]:
        """Count the call, bound it by its deadline, and turn what ends it into a gRPC status."""
        with self._counted():
            try:
                if self._draining:
                    raise Refused(grpc.StatusCode.UNAVAILABLE, "This server is shutting down; try again.")
                async with asyncio.timeout(context.time_remaining()):
                    yield
            except Refused as refusal:
                await context.abort(refusal.code, refusal.message)
            except TimeoutError:
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "The call's deadline passed before the answer was whole.")

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._running += 1
        self.idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self.idle.set()


def _forwarded(request: assistant_pb2.Request, context: Context) -> HttpRequest:
    return http_request(request.path, request.method, request.body, request.headers, context.invocation_metadata() or ())
