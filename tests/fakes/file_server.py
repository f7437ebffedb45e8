"""A real HTTP server with one file, whose answers follow a script: cut, lie, redirect, refuse."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answer:
    """One answer. Defaults: the file, from where the Range header says."""

    status: int = 200
    content: bytes | None = None  # instead of the server's file
    cut_after: int | None = None  # close the connection after this many body bytes
    announced: int | None = None  # a Content-Length that is not true
    announces: bool = True  # sends a Content-Length at all
    honours_range: bool = True
    redirect: str = ""
    gate: threading.Event | None = None  # the second half of the body waits for it


@dataclass
class FileServer:
    """What the server has, will do and has seen. After the script come plain answers."""

    content: bytes
    script: list[Answer] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)  # the Range header of each request
    url: str = ""


@contextmanager
def file_server(content: bytes, *script: Answer) -> Iterator[FileServer]:
    """Serve on a loopback port of the kernel's choice."""
    plan = FileServer(content, list(script))
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(plan)) as server:
        plan.url = f"http://127.0.0.1:{server.server_port}/model.gguf"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield plan
        finally:
            server.shutdown()
            thread.join()


def _handler(plan: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = plan.script.pop(0) if plan.script else Answer()
            plan.ranges.append(self.headers.get("range"))
            if answer.redirect:
                self.send_response(302)
                self.send_header("location", answer.redirect)
                self.send_header("content-length", "0")
                self.end_headers()
                return
            self._send(answer)

        def _send(self, answer: Answer) -> None:
            body = plan.content if answer.content is None else answer.content
            start, status, whole = 0, answer.status, len(body)
            if answer.honours_range and answer.status == 200 and (match := re.match(r"bytes=(\d+)-", plan.ranges[-1] or "")):
                start, status = int(match[1]), 206
                body = body[start:]
            self.send_response(status)
            if answer.announces:
                self.send_header("content-length", str(len(body) if answer.announced is None else answer.announced))
            if status == 206:
                self.send_header("content-range", f"bytes {start}-{whole - 1}/{whole}")
            self.send_header("connection", "close")
            self.end_headers()
            body = body[: answer.cut_after]
            half = len(body) // 2
            self.wfile.write(body[:half])
            if answer.gate is not None:
                assert answer.gate.wait(20)
            self.wfile.write(body[half:])

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    return Handler
