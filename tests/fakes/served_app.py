"""A small program: runs our runner on a scripted ASGI application, so that tests meet the real servers from outside.

    python -m tests.fakes.served_app daphne|uvicorn [--unix PATH | --port N] [--drain S] [--max-body N] [--relay PATH [--trust A]]

With --relay it serves the gateway's console relay to that socket instead.

It logs "Listening on ..." to standard error when it does. GET /await/<event> answers when that event has happened.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from assistant_site.asgi_types import Message, Receive, Scope, Send
from assistant_site.binding import AddressInUse, bind_tcp, bind_unix
from assistant_site.deadlines import DEFAULT, Deadlines
from assistant_site.runner import Serving, run
from gateway_app.console_relay import ConsoleRelay

HURRIED = Deadlines(head=0.1, body=0.1, keep_alive=1, stalled=0.1, discard=0.1, close=0.1)
FLOOD = 64 * 1024 * 1024
PIECE = b"x" * 65536


class Scripted:
    """The service: what each path does is its method."""

    def __init__(self) -> None:
        self.happened: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.facts: dict[str, Any] = {}

    async def start(self) -> None:
        """Nothing to start."""

    def drain(self) -> None:
        self.happened["drain"].set()

    async def stop(self) -> None:
        logging.getLogger("service").info("stopped")
        sys.stdout.write("stopped\n")  # stays in Python's buffer until the end

    async def application(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self.websocket(scope, receive, send)
            return
        name = scope["path"].strip("/").split("/")[0].replace("-", "_") or "echo"
        await getattr(self, f"do_{name}")(scope, receive, send)

    async def do_echo(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        pieces = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.happened["disconnect"].set()
                return
            body += message["body"]
            pieces += 1
            if not message["more_body"]:
                break
        facts = {
            "method": scope["method"],
            "path": scope["path"],
            "query": scope["query_string"].decode(),
            "length": len(body),
            "body": body[:200].decode("latin-1"),
            "headers": [[name.decode(), value.decode("latin-1")] for name, value in scope["headers"]],
            "client": scope["client"],
            "scheme": scope["scheme"],
        }
        cookies = [(b"set-cookie", b"a=1; Path=/"), (b"set-cookie", b"b=2; Path=/")]
        await answer(send, json.dumps(facts).encode(), cookies)

    async def do_empty(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def do_early_answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers without reading the body."""
        await answer(send, b"{}")

    async def do_early_failure(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("on purpose, before the answer")

    async def do_late_failure(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        self.happened["half"].set()
        await asyncio.sleep(0)
        raise RuntimeError("on purpose, in mid-answer")

    async def do_short_answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
        await send({"type": "http.response.body", "body": b"half"})

    async def do_split_header(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"{}", [(b"x-bad", b"a\r\nx-injected: b")])

    async def do_steps(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Three pieces; each further one comes when /happen/next is asked for."""
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for number in range(3):
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
            self.happened["begun"].set()
            await self.happened["next"].wait()
            self.happened["next"].clear()
        await send({"type": "http.response.body", "body": b""})

    async def do_duet(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers each piece of the body as it comes."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.happened["disconnect"].set()
                return
            more = message["more_body"]
            await send({"type": "http.response.body", "body": message.get("body", b""), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def do_endless(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one piece, then waits for the client to leave."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        self.happened["begun"].set()
        while (await receive())["type"] != "http.disconnect":
            pass
        self.happened["disconnect"].set()

    async def do_silent(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers nothing and waits for the client to leave."""
        await receive()
        self.happened["begun"].set()
        if (await receive())["type"] == "http.disconnect":
            self.happened["disconnect"].set()

    async def do_flood(self, scope: Scope, receive: Receive, send: Send) -> None:
        """64 MiB as fast as send() takes them; "blocked" happens when it takes none for a while."""
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % FLOOD)]})
        await receive()
        disconnected = asyncio.ensure_future(receive())
        sent = 0
        while sent < FLOOD:
            sending = asyncio.ensure_future(_body(send, PIECE))
            done, _ = await asyncio.wait({sending}, timeout=0.3)
            sent += len(PIECE)
            if not done:
                self.facts["blocked"] = sent
                self.happened["blocked"].set()
                await sending
            if disconnected.done():
                self.happened["given-up"].set()
                return
        self.facts.setdefault("blocked", sent)
        self.happened["blocked"].set()
        await send({"type": "http.response.body", "body": b""})

    # What tests ask about the others

    async def do_happen(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.happened[scope["path"].rsplit("/", 1)[1]].set()
        await answer(send, b"{}")

    async def do_forget(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.happened.clear()
        self.facts.clear()
        await answer(send, b"{}")

    async def do_await(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path"].rsplit("/", 1)[1]
        await self.happened[name].wait()
        await answer(send, json.dumps(self.facts.get(name)).encode())

    async def websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Echoes; "close 4001" closes with that code, "fail" fails, "client" tells who we are, /refuse is refused."""
        await receive()
        if scope["path"] == "/refuse":
            await send({"type": "websocket.close", "code": 4403})
            return
        protocols = scope["subprotocols"]
        await send({"type": "websocket.accept", "subprotocol": protocols[-1] if protocols else None})
        self.happened["open"].set()
        while (message := await receive())["type"] == "websocket.receive":
            text = message.get("text")
            if text == "fail":
                raise RuntimeError("on purpose, on a WebSocket")
            if text == "client":
                await send({"type": "websocket.send", "text": json.dumps(scope["client"])})
            elif text and text.startswith("close "):
                await send({"type": "websocket.close", "code": int(text.split()[1]), "reason": "as asked"})
                return
            elif text is not None:
                await send({"type": "websocket.send", "text": text})
            else:
                await send({"type": "websocket.send", "bytes": message["bytes"]})
        self.facts["closed"] = message["code"]
        self.happened["closed"].set()


class Relaying:
    """The gateway's relay alone, as a service."""

    def __init__(self, relay: ConsoleRelay) -> None:
        self.application = relay
        self.start = relay.start
        self.stop = relay.stop

    def drain(self) -> None:
        """Nothing to tell."""


async def _body(send: Send, piece: bytes) -> None:
    await send({"type": "http.response.body", "body": piece, "more_body": True})


async def answer(send: Send, body: bytes, extra: list[tuple[bytes, bytes]] | None = None) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *(extra or [])]
    start: Message = {"type": "http.response.start", "status": 200, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("server", choices=("daphne", "uvicorn"))
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--unix", type=Path)
    parser.add_argument("--relay")
    parser.add_argument("--hurry", action="store_true", help="deadlines of a fraction of a second")
    parser.add_argument("--trust", action="append", default=[])
    parser.add_argument("--drain", type=float, default=5.0)
    parser.add_argument("--max-body", type=int, default=1_000_000)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        listener = bind_unix(options.unix) if options.unix else bind_tcp("127.0.0.1", options.port, "ASSISTANT_HTTP_ADDR")
    except AddressInUse as error:
        logging.getLogger("served_app").error("%s", error)
        return 1
    service = Relaying(ConsoleRelay(options.relay, options.trust)) if options.relay else Scripted()
    deadlines = HURRIED if options.hurry else DEFAULT
    serving = Serving(options.server, options.drain, options.max_body, forwarded=options.unix is not None, deadlines=deadlines)
    return run(service, listener, serving)


if __name__ == "__main__":
    sys.exit(main())
