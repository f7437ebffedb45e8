"""A stand-in engine: a small HTTP server that behaves as told. Its adapter is in tests/models/toy.py.

Run by path with its runtime folder: toy_engine.py <folder>. toy.json there says how it behaves:
serve (answers /slots as an engine does), exit (prints a reason and ends), silent (never listens), slow (listens after
delay_s, saying so all the while), deaf (serves and ignores TERM), wrong (answers everybody, key or not), taken (ends as an engine
does whose port somebody else has).

It imports nothing that takes time, so that tests can start hundreds: run it with python -I -S.
"""

import os
import signal
import socket
import sys
import time

TOY = os.path.abspath(__file__)  # noqa: PTH100  # pathlib takes long to import
ANSWERS = {True: (200, b'[{"id": 0, "is_processing": false}]'), False: (401, b"{}")}


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def answer(connection: socket.socket, secret: bytes, answers_everybody: bool) -> None:
    """One request, which has no body, and goodbye."""
    connection.settimeout(2.0)
    asked = b""
    while b"\r\n\r\n" not in asked:
        piece = connection.recv(4096)
        if not piece:
            return
        asked += piece
    known = answers_everybody or b": Bearer " + secret + b"\r\n" in asked
    status, body = ANSWERS[known]
    head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    connection.sendall(head.encode() + body)


def serve(port: int, secret: str, answers_everybody: bool) -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen(64)
        say("toy: listening")
        while True:
            connection, _ = server.accept()
            with connection:
                try:
                    answer(connection, secret.encode(), answers_everybody)
                except OSError:  # the client has gone
                    continue


def read(folder: str) -> dict[str, str]:
    """toy.json holds one flat object of strings; the json module would take as long as the rest of the start."""
    with open(f"{folder}/toy.json") as file:  # noqa: PTH123  # pathlib takes long, too
        pairs = file.read().strip("{}\n ").split(", ")
    return {name.strip('"'): value.strip('"') for name, value in (pair.split(": ", 1) for pair in pairs)}


def main(folder: str) -> int:
    said = read(folder)
    behaviour = said["behaviour"]
    if behaviour == "exit":
        say("toy: the tensor is missing")
        return 4
    if behaviour == "taken":
        say(f"couldn't bind HTTP server socket, hostname: 127.0.0.1, port: {said['port']}")
        return 1
    if behaviour == "silent":
        say("toy: loading for ever")
        signal.pause()
    until = time.monotonic() + float(said.get("delay_s", "0"))
    while time.monotonic() < until:
        say("toy: loading")
        time.sleep(0.05)
    if behaviour == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    serve(int(said["port"]), said["secret"], behaviour == "wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
