"""A stand-in for llama.cpp's `llama-server`: a real program with its flags, endpoints and life, and no model in it.

It emulates what the platform relies on: --version and --help, a strict command line, 503 while loading, /health, /slots and
/props behind the key of --api-key-file, completions on --parallel slots with a queue behind them, streams token by token, a
slot that is free as soon as its client has gone. What it says is words of its own. How it behaves stands in
`<model file>.json`, read at the start of each process:

    load_s        seconds before it is ready                      (0.05)
    tokens        tokens of an answer without max_tokens          (8)
    token_s       seconds between two tokens                      (0.0)
    exit_at_load  exit code after load_s instead of serving
    say           lines for standard error, before that
    signal        number of a signal it sends itself after load_s
    never_ready   it loads for ever
    other_key     it demands another key than it was given
    deaf          it serves, but answers nothing at all after so many completions
    touch_mib     memory it really takes
    ignore_term   TERM does not end it

`install(folder)` makes an executable named llama-server there.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

VERSION = "version: 9999 (abcdef0)\nbuilt with a stand-in for tests"
WITH_VALUE = (
    "--host", "--port", "--model", "--alias", "--api-key-file", "--ctx-size", "--parallel", "--batch-size", "--ubatch-size",
    "--threads", "--n-gpu-layers", "--pooling", "--chat-template", "--cache-ram", "--log-colors", "--fit", "--seed",
    "--cache-type-k", "--cache-type-v", "--temp", "--top-k", "--top-p", "--predict", "--n-predict", "--split-mode", "--device",
    "--tensor-split", "--main-gpu",
)  # fmt: skip
SWITCHES = (
    "--metrics", "--embedding", "--slots", "--no-ui", "--no-webui", "--offline", "--log-timestamps", "--log-prefix", "--jinja",
    "--no-jinja", "--mlock", "--no-mmap",
)  # fmt: skip
GOOD, LOADING = "200 OK", "503 Service Unavailable"


def install(folder: Path) -> Path:
    """The program, ready to be named in ASSISTANT_LLAMA_SERVER."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "llama-server"
    program.write_text(f"#!{sys.executable} -IS\n" + Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    program.chmod(0o755)
    return program


def arguments(argv: list[str]) -> dict[str, str]:
    """The command line by flag; anything unknown ends the program as the real one would."""
    found: dict[str, str] = {}
    rest = iter(argv)
    for flag in rest:
        if flag in SWITCHES:
            found[flag] = ""
        elif flag in WITH_VALUE:
            value = next(rest, None)
            if value is None:
                sys.exit(f'error while handling argument "{flag}": expected value for argument')
            found[flag] = value
        else:
            sys.exit(f"error: invalid argument: {flag}")
    return found


class Server:
    """One process. Slots are counted as the real one's are: a request has one from its beginning to its end."""

    def __init__(self, flags: dict[str, str], script: dict[str, Any]) -> None:
        self.flags = flags
        self.script = script
        self.key = Path(flags["--api-key-file"]).read_text().strip() + ("x" if script.get("other_key") else "")
        self.slots = int(flags["--parallel"])
        self.free = asyncio.Semaphore(self.slots)
        self.running: dict[int, list[int]] = {}  # task number → [prompt tokens, tokens written]
        self.tasks = 0
        self.loaded = False
        self.ballast = bytearray()

    async def load(self) -> None:
        await asyncio.sleep(self.script.get("load_s", 0.05))
        for line in self.script.get("say", []):
            sys.stderr.write(line + "\n")
        sys.stderr.flush()
        if "exit_at_load" in self.script:
            os._exit(self.script["exit_at_load"])
        if "signal" in self.script:
            os.kill(os.getpid(), self.script["signal"])
        self.ballast = bytearray(os.urandom(1) * (self.script.get("touch_mib", 0) << 20))
        self.loaded = not self.script.get("never_ready")
        sys.stderr.write("main: model loaded\n" if self.loaded else "main: still loading\n")
        sys.stderr.flush()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode("latin-1").split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = first.split(" ")
                await self.answer(method, path, headers, body, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        if self.script.get("deaf") is not None and self.tasks >= self.script["deaf"]:
            await asyncio.sleep(3600)
        if path == "/health":
            return await send(writer, GOOD if self.loaded else LOADING, {"status": "ok" if self.loaded else "loading model"})
        if not self.loaded:
            return await send(writer, LOADING, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}})
        if headers.get("authorization") != f"Bearer {self.key}":
            return await send(writer, "401 Unauthorized", {"error": {"message": "Invalid API Key", "code": 401}})
        if (method, path) == ("GET", "/slots"):
            return await send(writer, GOOD, self.slot_list())
        if (method, path) == ("GET", "/props"):
            return await send(writer, GOOD, {"total_slots": self.slots, "model_alias": self.flags["--alias"]})
        if method == "POST" and path in ("/v1/chat/completions", "/v1/completions"):
            return await self.complete(json.loads(body), reader, writer)
        if method == "POST" and path == "/v1/embeddings" and "--embedding" in self.flags:
            return await self.embed(json.loads(body), writer)
        return await send(
            writer, "404 Not Found", {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}
        )

    def slot_list(self) -> list[dict[str, Any]]:
        busy: list[dict[str, Any]] = [
            {"id_task": task, "n_prompt_tokens_processed": done[0], "next_token": [{"n_decoded": done[1]}], "is_processing": True}
            for task, done in self.running.items()
        ]
        idle = [{"is_processing": False} for _ in range(self.slots - len(busy))]
        return [{"id": number, **slot} for number, slot in enumerate([*busy, *idle])]

    async def complete(self, call: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        work = asyncio.ensure_future(self.generate(call, writer))
        gone = asyncio.ensure_future(reader.read(1))  # the gateway sends nothing before it has the answer
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        for task in (work, gone):
            task.cancel()
        if not work.done():
            raise ConnectionError
        await asyncio.gather(work, gone, return_exceptions=True)
        if work.cancelled() or work.exception() is not None:
            raise ConnectionError

    async def generate(self, call: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        count = call.get("max_tokens") or call.get("max_completion_tokens") or self.script.get("tokens", 8)
        prompt = len(json.dumps(call.get("messages") or call.get("prompt")))
        async with self.free:
            self.tasks += 1
            task, done = self.tasks, [prompt, 0]
            self.running[task] = done
            try:
                await (self.stream if call.get("stream") else self.whole)(call, count, done, writer)
            finally:
                del self.running[task]

    async def tokens(self, count: int, done: list[int]) -> list[str]:
        words = []
        for number in range(count):
            await asyncio.sleep(self.script.get("token_s", 0.0))
            done[1] += 1
            words.append(f"word{number} ")
        return words

    async def whole(self, call: dict[str, Any], count: int, done: list[int], writer: asyncio.StreamWriter) -> None:
        text = "".join(await self.tokens(count, done))
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "text": text, "finish_reason": "length"}
        await send(writer, GOOD, {"object": "chat.completion", **self.common(), "choices": [choice], "usage": usage(done)})

    async def stream(self, call: dict[str, Any], count: int, done: list[int], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(count):
            await asyncio.sleep(self.script.get("token_s", 0.0))
            done[1] += 1
            await self.event(writer, {"delta": {"content": f"word{number} "}, "index": 0, "finish_reason": None})
        await self.event(writer, {"delta": {}, "index": 0, "finish_reason": "length"})
        if (call.get("stream_options") or {}).get("include_usage"):
            await chunk(writer, {"object": "chat.completion.chunk", **self.common(), "choices": [], "usage": usage(done)})
        await chunk(writer, None)

    async def event(self, writer: asyncio.StreamWriter, choice: dict[str, Any]) -> None:
        await chunk(writer, {"object": "chat.completion.chunk", **self.common(), "choices": [choice]})

    def common(self) -> dict[str, Any]:
        return {"id": f"chatcmpl-{os.getpid()}-{self.tasks}", "created": 0, "model": self.flags["--alias"]}

    async def embed(self, call: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        texts = call["input"] if isinstance(call["input"], list) else [call["input"]]
        data = [
            {"object": "embedding", "index": number, "embedding": [float(len(text)), 1.0]} for number, text in enumerate(texts)
        ]
        told = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        await send(writer, GOOD, {"object": "list", "model": self.flags["--alias"], "data": data, "usage": told})


def usage(done: list[int]) -> dict[str, int]:
    return {"prompt_tokens": done[0], "completion_tokens": done[1], "total_tokens": done[0] + done[1]}


async def send(writer: asyncio.StreamWriter, status: str, body: Any) -> None:
    text = json.dumps(body).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    writer.write(head.encode() + text)
    await writer.drain()


async def chunk(writer: asyncio.StreamWriter, event: dict[str, Any] | None) -> None:
    """One event, or [DONE] and the end of the stream."""
    text = b"data: " + (json.dumps(event).encode() if event is not None else b"[DONE]") + b"\n\n"
    writer.write(b"%x\r\n%s\r\n" % (len(text), text) + (b"" if event is not None else b"0\r\n\r\n"))
    await writer.drain()


async def run(flags: dict[str, str]) -> None:
    script_file = Path(flags["--model"] + ".json")
    script = json.loads(script_file.read_text()) if script_file.exists() else {}
    if script.get("ignore_term"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server = Server(flags, script)
    try:
        listening = await asyncio.start_server(server.serve, flags["--host"], int(flags["--port"]))
    except OSError:
        sys.exit(f"couldn't bind HTTP server socket, hostname: {flags['--host']}, port: {flags['--port']}")
    async with listening:
        await server.load()
        await listening.serve_forever()


def main(argv: list[str]) -> None:
    if argv == ["--version"]:
        print(VERSION)  # noqa: T201
    elif argv == ["--help"]:
        print("\n".join([f"{flag} VALUE  a setting" for flag in WITH_VALUE] + [f"{flag}  a switch" for flag in SWITCHES]))  # noqa: T201
    else:
        asyncio.run(run(arguments(argv)))


if __name__ == "__main__":
    main(sys.argv[1:])
