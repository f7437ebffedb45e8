"""Relays what is not the data plane to the console process on its private socket: HTTP and WebSocket, streaming both ways."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from gateway_app import errors
from gateway_app.endpoints.http import Message, Receive, Scope, Send
from gateway_app.forwarded import ForwardedHeaders

logger = logging.getLogger(__name__)

CONNECT_S = 5.0
CLOSE_S = 2.0  # for the console to answer a WebSocket close
MAX_MESSAGE = 1024 * 1024  # bytes of one WebSocket message
RETRY_S = 2  # what a browser waits before it asks again

HOP_BY_HOP = {
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}
# Ours to set, or answered by the server in front of us.
REPLACED = {b"expect", b"forwarded", b"x-real-ip"}

STARTING_PAGE = f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta http-equiv="refresh" content="{RETRY_S}"><title>Starting</title>
<style>body {{ font-family: system-ui, sans-serif; margin: 20vh auto; max-width: 32rem; padding: 0 1rem }}</style></head>
<body><h1>The console is starting</h1>
<p>The console is starting; this page reloads. Models and API keys work meanwhile.</p></body>
</html>
""".encode()


class ConsoleRelay:
    """An ASGI application for "http" and "websocket" scopes. Answers 502 while the console does not listen. Never relays /v1."""

    def __init__(self, socket_path: str, trusted_proxies: Sequence[str] = ()) -> None:
        self._socket_path = socket_path
        self._forwarded = ForwardedHeaders(trusted_proxies)
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Nothing is connected yet: the console may come later."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(self._socket_path, limit=0),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=None),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            max_line_size=16 * 1024,
            max_field_size=64 * 1024,
        )

    async def stop(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._session is None:
            raise RuntimeError("The relay was not started.")
        if scope["type"] == "websocket":
            await _WebSocketRelay(self._session, receive, send).run(scope, self._url(scope), self._headers(scope))
        elif _is_data_plane(scope["path"]):
            error = errors.unknown_path(scope["path"])
            await _answer(scope, send, error.status, error.body(), b"application/json")
        else:
            await self._relay(scope, receive, send)

    async def _relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = _Client(scope, receive)
        await _first_of(self._exchange(scope, client, send), client.left())

    async def _exchange(self, scope: Scope, client: _Client, send: Send) -> None:
        assert self._session is not None
        try:
            response = await self._session.request(
                scope["method"],
                self._url(scope),
                headers=self._headers(scope),
                data=client.body() if client.has_body else None,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as error:
            client.body_over.set()
            logger.info("The console did not answer %s %s: %s", scope["method"], scope["path"], error)
            await _unavailable(scope, send)
            return
        async with response:
            await send({"type": "http.response.start", "status": response.status, "headers": _end_to_end(response.raw_headers)})
            try:
                async for data in response.content.iter_any():
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except aiohttp.ClientError as error:
                raise ConnectionAbortedError(f"The console broke off its answer: {error}") from error
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _url(self, scope: Scope) -> URL:
        target = scope.get("raw_path") or scope["path"].encode()
        query = scope["query_string"]
        return URL("http://console" + (target + b"?" + query if query else target).decode("ascii"), encoded=True)

    def _headers(self, scope: Scope) -> CIMultiDict[str]:
        headers: CIMultiDict[str] = CIMultiDict()
        for name, value in _end_to_end(scope["headers"]):
            if name not in REPLACED and not name.startswith((b"x-forwarded-", b"sec-websocket-")):
                headers.add(name.decode("latin-1"), _text(value))
        for forwarded, text in self._forwarded.of(scope):
            headers.add(forwarded, text)
        return headers


class _Client:
    """The client's side of one HTTP request: its body, then its hanging up."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        self._gone = False
        names = {name: value for name, value in scope["headers"] if name in (b"content-length", b"transfer-encoding")}
        self.has_body = b"transfer-encoding" in names or names.get(b"content-length", b"0") != b"0"
        self.body_over = asyncio.Event()
        if not self.has_body:
            self.body_over.set()

    async def body(self) -> AsyncIterator[bytes]:
        """Pieces as they come; ends by ClientGone where the client leaves before the end."""
        try:
            more = True
            while more:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    self._gone = True
                    raise ConnectionAbortedError("The client left before its body was whole.")
                more = message.get("more_body", False)
                if message.get("body"):
                    yield message["body"]
        finally:
            self.body_over.set()

    async def left(self) -> None:
        """Return once the client has hung up."""
        await self.body_over.wait()
        while not self._gone:
            self._gone = (await self._receive())["type"] == "http.disconnect"


class _WebSocketRelay:
    """One WebSocket on each side; what one sends or closes the other gets."""

    def __init__(self, session: aiohttp.ClientSession, receive: Receive, send: Send) -> None:
        self._session = session
        self._receive = receive
        self._send = send

    async def run(self, scope: Scope, url: URL, headers: CIMultiDict[str]) -> None:
        """Connect to the console first, so that its subprotocol or its refusal is what the client gets."""
        await self._receive()  # websocket.connect
        try:
            console = await self._session.ws_connect(
                url,
                protocols=scope.get("subprotocols", ()),
                headers=headers,
                compress=0,
                autoping=True,
                max_msg_size=MAX_MESSAGE,
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_S),
            )
        except (aiohttp.ClientError, OSError) as error:
            logger.info("The console refused WebSocket %s: %s", scope["path"], error)
            await self._send({"type": "websocket.close", "code": 1013})
            return
        async with console:
            await self._send({"type": "websocket.accept", "subprotocol": console.protocol})
            await _first_of(self._to_console(console), self._to_client(console))

    async def _to_console(self, console: aiohttp.ClientWebSocketResponse) -> None:
        while (message := await self._receive())["type"] == "websocket.receive":
            data = message.get("bytes")
            if data is not None:
                await console.send_bytes(data)
            else:
                await console.send_str(message["text"])
        await console.close(code=sendable(message.get("code")), message=(message.get("reason") or "").encode())

    async def _to_client(self, console: aiohttp.ClientWebSocketResponse) -> None:
        reason = ""
        while True:
            message = await console.receive()
            if message.type is aiohttp.WSMsgType.TEXT:
                await self._send({"type": "websocket.send", "text": message.data})
            elif message.type is aiohttp.WSMsgType.BINARY:
                await self._send({"type": "websocket.send", "bytes": message.data})
            else:
                if message.type is aiohttp.WSMsgType.CLOSE:
                    reason = message.extra or ""
                break
        await self._send({"type": "websocket.close", "code": sendable(console.close_code), "reason": reason})


def sendable(code: int | None) -> int:
    """The close code to pass on: 1005 (none given) becomes 1000, what no peer may send becomes 1011."""
    if code is None or code == 1005:
        return 1000
    if (1000 <= code <= 1014 and code not in (1004, 1006)) or 3000 <= code <= 4999:
        return code
    return 1011


async def _first_of(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run all until one ends, then end the others; raises what the first one raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def _is_data_plane(path: str) -> bool:
    return path == "/v1" or path.startswith("/v1/")


def _end_to_end(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Without the headers that belong to one connection, those named by Connection included; repeated ones stay repeated."""
    dropped = set(HOP_BY_HOP)
    for name, value in headers:
        if name.lower() == b"connection":
            dropped.update(token.strip().lower() for token in value.split(b","))
    return [(name, value) for name, value in headers if name.lower() not in dropped]


def _text(value: bytes) -> str:
    """aiohttp writes headers as UTF-8, so UTF-8 bytes come out as they went in."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


async def _unavailable(scope: Scope, send: Send) -> None:
    """502: a page that reloads itself for browsers, an error object for programs."""
    accept = b",".join(value for name, value in scope["headers"] if name == b"accept")
    if b"text/html" in accept and scope["method"] in ("GET", "HEAD"):
        await _answer(scope, send, 502, STARTING_PAGE, b"text/html; charset=utf-8")
        return
    error = errors.ApiError(502, "The console does not answer; it may be starting.", errors.SERVER_ERROR, "console_unavailable")
    await _answer(scope, send, 502, error.body(), b"application/json")


async def _answer(scope: Scope, send: Send, status: int, body: bytes, content_type: bytes) -> None:
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), (b"cache-control", b"no-store")]
    if status == 502:
        headers.append((b"retry-after", b"%d" % RETRY_S))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    last: Message = {"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body, "more_body": False}
    await send(last)
