"""AssistantService over a real server, a real channel and a real HTTP server in the gateway's place."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from gateway_app.rpc.assistant_pb2 import InfoRequest, Request, Response
from gateway_app.rpc.gateway_client import GatewayClient, loopback_origin
from gateway_app.rpc.server import RpcServer
from gateway_app.rpc.service import MAX_MESSAGE, AssistantService
from tests.conftest import free_port
from tests.fakes.gated_gateway import Exchange, GatedGateway

CHAT = "/v1/chat/completions"
PATIENCE_S = 10.0


async def soon(awaitable: Awaitable[Any]) -> Any:
    """Fail rather than hang."""
    return await asyncio.wait_for(awaitable, PATIENCE_S)


async def status_of(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await soon(call)
    return caught.value.code(), caught.value.details() or ""


# --- forwarding ----------------------------------------------------------------------------------------------------------


async def test_a_call_becomes_the_http_request_it_describes(gateway: GatedGateway, stub: Any) -> None:
    headers = {"Authorization": "Bearer k", "Content-Type": "application/json", "X-Session-Id": "s"}
    answer: Response = await soon(stub.ForwardRequest(Request(path=CHAT, method="POST", body=b'{"a": 1}', headers=headers)))
    assert (answer.status, answer.body) == (200, b'{"ok": true}')
    assert answer.headers["content-type"] == "application/json"
    assert "transfer-encoding" not in answer.headers
    [request] = gateway.received
    assert (request.method, request.target, request.body) == ("POST", CHAT, b'{"a": 1}')
    assert request.headers.pop("host") == f"127.0.0.1:{gateway.port}"
    assert request.headers == {
        "authorization": "Bearer k",
        "content-type": "application/json",
        "x-session-id": "s",
        "content-length": "8",
        "connection": "keep-alive",
    }


async def test_headers_of_the_connection_and_claims_about_the_client_do_not_pass(gateway: GatedGateway, stub: Any) -> None:
    dropped = [
        "host", "connection", "keep-alive", "transfer-encoding", "content-length", "te", "upgrade", "expect", "forwarded",
        "x-assistant-client", "X-Assistant-Hops", "x-forwarded-for", "x-mine",
    ]  # fmt: skip
    headers = dict.fromkeys(dropped, "1") | {"connection": "close, X-Mine", "x-kept": "yes"}
    await soon(stub.ForwardRequest(Request(path="/v1/models", method="get", headers=headers)))
    [request] = gateway.received
    assert request.method == "GET"
    assert request.headers == {"host": f"127.0.0.1:{gateway.port}", "x-kept": "yes", "connection": "keep-alive"}


async def test_an_http_error_travels_in_the_response(gateway: GatedGateway, stub: Any) -> None:
    async def refuse(exchange: Exchange) -> None:
        await exchange.answer(401, b'{"error": {}}', www_authenticate="Bearer", x_request_id="r1")

    gateway.script = refuse
    answer: Response = await soon(stub.ForwardRequest(Request(path=CHAT, method="POST", body=b"{}")))
    assert (answer.status, answer.body) == (401, b'{"error": {}}')
    assert answer.headers["www-authenticate"] == "Bearer"
    messages = [message async for message in stub.ForwardRequestStream(Request(path=CHAT, method="POST", body=b"{}"))]
    assert [(message.status, message.body) for message in messages] == [(401, b""), (0, b'{"error": {}}')]


async def test_a_redirect_is_handed_over_and_not_followed(gateway: GatedGateway, stub: Any) -> None:
    async def redirect(exchange: Exchange) -> None:
        await exchange.answer(307, b"", location="http://127.0.0.1:1/")

    gateway.script = redirect
    answer: Response = await soon(stub.ForwardRequest(Request(path="/v1/models", method="GET")))
    assert (answer.status, answer.headers["location"]) == (307, "http://127.0.0.1:1/")


async def test_a_stream_arrives_chunk_by_chunk_while_the_gateway_still_writes(gateway: GatedGateway, stub: Any) -> None:
    gates = [asyncio.Event() for _ in range(4)]

    async def stream(exchange: Exchange) -> None:
        await exchange.head(200, content_type="text/event-stream")
        for number, gate in enumerate(gates):
            await gate.wait()
            await exchange.chunk(b"data: %d\n\n" % number)
        await exchange.end()

    gateway.script = stream
    call = stub.ForwardRequestStream(Request(path=CHAT, method="POST", body=b"{}"))
    first: Response = await soon(call.read())
    assert (first.status, first.headers["content-type"], first.body) == (200, "text/event-stream", b"")
    for number, gate in enumerate(gates):  # no later chunk has been written when this one is read
        gate.set()
        message: Response = await soon(call.read())
        assert (message.status, message.body, dict(message.headers)) == (0, b"data: %d\n\n" % number, {})
    assert await soon(call.read()) is grpc.aio.EOF
    assert await soon(call.code()) is grpc.StatusCode.OK


async def test_a_client_that_does_not_read_stops_the_gateway_from_writing(gateway: GatedGateway, stub: Any) -> None:
    size, count = 1_000_000, 64
    written = 0
    stalled = asyncio.Event()

    async def flood(exchange: Exchange) -> None:
        nonlocal written
        await exchange.head()
        for _ in range(count):
            try:
                await asyncio.wait_for(exchange.chunk(bytes(size)), 0.5)
            except TimeoutError:
                stalled.set()
                await exchange.chunk(b"")
                return
            written += 1

    gateway.script = flood
    call = stub.ForwardRequestStream(Request(path=CHAT, method="POST", body=b"{}"))
    await soon(call.read())
    await soon(stalled.wait())
    assert written < count / 2
    call.cancel()


# --- keys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "metadata", "key"),
    [
        ({"authorization": "Bearer a"}, (), "Bearer a"),
        ({}, (("authorization", "Bearer b"),), "Bearer b"),
        ({"authorization": "Bearer a"}, (("authorization", "Bearer a"),), "Bearer a"),
        ({}, (), None),
    ],
)
async def test_the_key_comes_from_the_headers_or_the_metadata(
    gateway: GatedGateway, stub: Any, headers: dict[str, str], metadata: tuple[tuple[str, str], ...], key: str | None
) -> None:
    await soon(stub.ForwardRequest(Request(path="/v1/models", method="GET", headers=headers), metadata=metadata))
    assert gateway.received[0].headers.get("authorization") == key


@pytest.mark.parametrize(
    ("headers", "metadata"),
    [
        ({"authorization": "Bearer a"}, (("authorization", "Bearer b"),)),
        ({"authorization": "Bearer a", "Authorization": "Bearer b"}, ()),
        ({}, (("authorization", "Bearer a"), ("authorization", "Bearer b"))),
    ],
)
async def test_two_different_keys_are_refused_before_anything_is_sent(
    gateway: GatedGateway, stub: Any, headers: dict[str, str], metadata: tuple[tuple[str, str], ...]
) -> None:
    request = Request(path="/v1/models", method="GET", headers=headers)
    code, details = await status_of(stub.ForwardRequest(request, metadata=metadata))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert "Two different API keys" in details
    assert "Bearer" not in details
    assert gateway.received == []


# --- what may not pass ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/admin/", "/v1", "/v1/", "v1/models", "/v1/../admin/", "/v1/a..b", "/v1/models?x=1", "/v1/%2e%2e/admin", "/v1/a b",
     "/v1/models\r\nx: y", "http://elsewhere/v1/models", "", "/V1/models", "/v1/models\n"],
)  # fmt: skip
async def test_a_path_outside_the_api_is_refused(gateway: GatedGateway, stub: Any, path: str) -> None:
    code, details = await status_of(stub.ForwardRequest(Request(path=path, method="GET")))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "must start with /v1/" in details
    assert gateway.received == []


@pytest.mark.parametrize("method", ["", "PUT", "CONNECT", "HEAD", "GET /x"])
async def test_a_method_outside_the_api_is_refused(gateway: GatedGateway, stub: Any, method: str) -> None:
    code, details = await status_of(stub.ForwardRequest(Request(path="/v1/models", method=method)))
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "The method must be one of GET, POST, DELETE.")
    assert gateway.received == []


@pytest.mark.parametrize("header", [("x-a", "1\r\nx-b: 2"), ("x a", "1"), ("x-a:", "1"), ("", "1"), ("x-a", "\x00")])
async def test_a_header_that_would_break_the_request_is_refused(
    gateway: GatedGateway, stub: Any, header: tuple[str, str]
) -> None:
    request = Request(path="/v1/models", method="GET", headers=dict([header]))
    code, details = await status_of(stub.ForwardRequest(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "is not a valid HTTP header" in details
    assert gateway.received == []


async def test_a_request_over_the_message_limit_is_refused_and_one_below_it_passes(gateway: GatedGateway, stub: Any) -> None:
    code, _ = await status_of(stub.ForwardRequest(Request(path=CHAT, method="POST", body=bytes(MAX_MESSAGE + 1))))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert gateway.received == []
    await soon(stub.ForwardRequest(Request(path=CHAT, method="POST", body=bytes(32 * 1024 * 1024))))
    assert len(gateway.received[0].body) == 32 * 1024 * 1024


async def test_an_answer_too_long_for_one_message_says_to_stream(gateway: GatedGateway, stub: Any) -> None:
    async def long(exchange: Exchange) -> None:
        await exchange.head()
        for _ in range(33):
            await exchange.chunk(bytes(1024 * 1024))
        await exchange.end()

    gateway.script = long
    code, details = await status_of(stub.ForwardRequest(Request(path=CHAT, method="POST", body=b"{}")))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "ForwardRequestStream" in details
    total = 0
    async for message in stub.ForwardRequestStream(Request(path=CHAT, method="POST", body=b"{}")):
        total += len(message.body)
    assert total == 33 * 1024 * 1024


# --- ends ----------------------------------------------------------------------------------------------------------------


async def never(exchange: Exchange) -> None:
    """Take the request and say nothing."""
    await asyncio.Event().wait()


async def after_one_chunk_never(exchange: Exchange) -> None:
    """Start a stream and leave it there."""
    await exchange.head()
    await exchange.chunk(b"data: 0\n\n")
    await asyncio.Event().wait()


@pytest.mark.parametrize("script", [never, after_one_chunk_never])
@pytest.mark.parametrize("method", ["ForwardRequest", "ForwardRequestStream"])
async def test_a_cancelled_call_closes_the_http_request(
    gateway: GatedGateway, stub: Any, script: Callable[[Exchange], Awaitable[None]], method: str
) -> None:
    gateway.script = script
    call = getattr(stub, method)(Request(path=CHAT, method="POST", body=b"{}"))
    reading = asyncio.ensure_future(call.read() if method == "ForwardRequestStream" else call)
    await soon(gateway.arrived.wait())
    assert not gateway.gone.is_set()
    call.cancel()
    await soon(gateway.gone.wait())
    await asyncio.gather(reading, return_exceptions=True)


@pytest.mark.parametrize("method", ["ForwardRequest", "ForwardRequestStream"])
async def test_a_deadline_ends_the_call_and_the_http_request(gateway: GatedGateway, stub: Any, method: str) -> None:
    gateway.script = after_one_chunk_never

    async def read_all() -> None:
        call = getattr(stub, method)(Request(path=CHAT, method="POST", body=b"{}"), timeout=0.3)
        if method == "ForwardRequest":
            await call
        else:
            assert [message async for message in call]

    code, _ = await status_of(read_all())
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await soon(gateway.gone.wait())


class Aborted(Exception):
    """What a server's context raises to end a call."""


class ContextOfADeafClient:
    """A call whose time is almost over and whose client never says that it has gone."""

    def time_remaining(self) -> float:
        return 0.05

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def write(self, message: Response) -> None:
        """Taken."""

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise Aborted(code)


@pytest.mark.parametrize("method", ["ForwardRequest", "ForwardRequestStream"])
async def test_the_deadline_holds_on_the_server_s_own_clock(gateway: GatedGateway, method: str) -> None:
    gateway.script = after_one_chunk_never
    async with GatewayClient(loopback_origin("127.0.0.1", gateway.port)) as client:
        call = getattr(AssistantService(client, "1"), method)
        with pytest.raises(Aborted) as caught:
            await soon(call(Request(path=CHAT, method="POST", body=b"{}"), ContextOfADeafClient()))
        assert caught.value.args == (grpc.StatusCode.DEADLINE_EXCEEDED,)
        await soon(gateway.gone.wait())


async def test_a_gateway_that_is_not_there_is_unavailable() -> None:
    port = free_port()
    async with GatewayClient(loopback_origin("127.0.0.1", port)) as client:
        server = RpcServer("127.0.0.1", 0, client, "1.2.3")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            forward = channel.unary_unary(
                "/assistant.AssistantService/ForwardRequest", Request.SerializeToString, Response.FromString
            )
            code, details = await status_of(forward(Request(path="/v1/models", method="GET")))
        await server.stop()
    assert code is grpc.StatusCode.UNAVAILABLE
    assert f"The gateway at http://127.0.0.1:{port} is not reachable" in details


@pytest.mark.parametrize("method", ["ForwardRequest", "ForwardRequestStream"])
async def test_a_gateway_that_breaks_off_is_not_taken_for_a_whole_answer(gateway: GatedGateway, stub: Any, method: str) -> None:
    async def broken(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(b"data: 0\n\n")
        await asyncio.sleep(0)
        exchange.break_off()

    gateway.script = broken

    async def read_all() -> None:
        call = getattr(stub, method)(Request(path=CHAT, method="POST", body=b"{}"))
        if method == "ForwardRequest":
            await call
        else:
            assert [message async for message in call]

    code, details = await status_of(read_all())
    assert code is grpc.StatusCode.INTERNAL
    assert "broke off" in details


# --- GetInfo -------------------------------------------------------------------------------------------------------------


async def models_for_key_a(exchange: Exchange) -> None:
    """The gateway's /v1/models: two models for one key, nothing for others."""
    if exchange.request.headers.get("authorization") != "Bearer a":
        return await exchange.answer(401, b'{"error": {}}')
    listed = {"object": "list", "data": [{"id": "tiny", "object": "model"}, {"id": "big", "object": "model"}]}
    return await exchange.answer(200, json.dumps(listed).encode())


async def test_info_without_a_key_tells_version_and_endpoints_but_no_models(gateway: GatedGateway, stub: Any) -> None:
    info = await soon(stub.GetInfo(InfoRequest()))
    assert (info.version, list(info.models)) == ("1.2.3", [])
    assert list(info.endpoints) == ["/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{id}"]
    assert gateway.received == []


async def test_info_with_a_key_names_the_models_it_may_use(gateway: GatedGateway, stub: Any) -> None:
    gateway.script = models_for_key_a
    info = await soon(stub.GetInfo(InfoRequest(), metadata=(("authorization", "Bearer a"),)))
    assert list(info.models) == ["tiny", "big"]
    code, details = await status_of(stub.GetInfo(InfoRequest(), metadata=(("authorization", "Bearer b"),)))
    assert (code, details) == (grpc.StatusCode.UNAUTHENTICATED, "The gateway does not accept this API key.")


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (503, b"{}", grpc.StatusCode.UNAVAILABLE),
        (200, b"<html>", grpc.StatusCode.INTERNAL),
        (200, b"[]", grpc.StatusCode.INTERNAL),
    ],
)
async def test_info_says_when_the_gateway_does_not_answer_as_one(
    gateway: GatedGateway, stub: Any, status: int, body: bytes, code: grpc.StatusCode
) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.answer(status, body)

    gateway.script = answer
    got, _ = await status_of(stub.GetInfo(InfoRequest(), metadata=(("authorization", "Bearer a"),)))
    assert got is code
