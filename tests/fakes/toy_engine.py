"""A stand-in engine: a small HTTP server that behaves as told, and its adapter. It shows what adding an engine takes.

Run by path with its runtime folder: toy_engine.py <folder>. toy.json there says how it behaves:
serve (answers /slots as an engine does), exit (prints a reason and ends), silent (never listens), deaf (serves and
ignores TERM), wrong (answers everybody, key or not).
"""

from __future__ import annotations

import json
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOY = Path(__file__)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def serve(port: int, secret: str, answers_everybody: bool) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = answers_everybody or self.headers.get("Authorization") == f"Bearer {secret}"
            body = b'[{"id": 0, "is_processing": false}]' if known else b"{}"
            self.send_response(200 if known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        say("toy: listening")
        server.serve_forever(poll_interval=0.05)


def main(folder: str) -> int:
    said = json.loads((Path(folder) / "toy.json").read_text())
    behaviour = said["behaviour"]
    if behaviour == "exit":
        say("toy: the tensor is missing")
        return 4
    if behaviour == "silent":
        say("toy: loading for ever")
        signal.pause()
    if behaviour == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    serve(said["port"], said["secret"], behaviour == "wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
