"""Plain calls: what goes to the engine, what comes back, and every error there is."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from models_app.models import State
from tests.fakes.scripted_upstream import Peer, ScriptedUpstream, response
from tests.gateway.conftest import ENGINE_SECRET, Cast, Engine, Serve, Served, in_database, until


def answer(model: str = "tiny", content: str = "hello", finish: str = "stop") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, "prompt_tokens_details": {"cached_tokens": 2}}
    return json.dumps({"id": "c", "object": "chat.completion", "model": model, "choices": [choice], "usage": usage}).encode()


async def good(peer: Peer) -> None:
    await peer.read_request()
    peer.write(response(answer()))


def replying(*answers: bytes) -> Any:
    """A script that gives these answers in turn, then the last one again and again."""
    left = list(answers)

    async def script(peer: Peer) -> None:
        await peer.read_request()
        peer.write(left.pop(0) if len(left) > 1 else left[0])

    return script


def failure(status: int, message: str = "broken", **fields: Any) -> bytes:
    return response(json.dumps({"error": {"message": message, **fields}}).encode(), status)


async def tiny(cast: Cast, upstream: ScriptedUpstream, **fields: Any) -> None:
    def make() -> None:
        cast.instance(cast.model(**fields), upstream.port)

    await in_database(make)


def error_of(reply: httpx.Response) -> tuple[int, str | None, str | None]:
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    return reply.status_code, error["code"], error["param"]


async def test_a_chat_is_answered_by_the_ready_instance_and_metered(cast: Cast, serve: Serve, engine: Engine) -> None:
    upstream = await engine(good)
    await tiny(cast, upstream)
    gateway = await serve()
    reply = await gateway.chat()
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["message"]["content"] == "hello"
    request = upstream.requests[0]
    assert request.target == "/v1/chat/completions"
    assert request.header("authorization") == f"Bearer {ENGINE_SECRET}"
    assert request.header("accept-encoding") == "identity"
    assert gateway.key not in str(request)
    start, end = gateway.events()
    assert (start["t"], end["t"], start["id"]) == ("start", "end", end["id"])
    assert end["model"] == "tiny"
    assert end["backend"].startswith("instance:")
    assert (end["status"], end["end"], end["error_code"]) == (200, "stop", "")
    assert (end["prompt"], end["cached"], end["completion"]) == (7, 2, 3)
    assert 0 <= end["queue_ms"] <= end["total_ms"]
    assert end["first_ms"] is None  # nobody saw when the first token was made


async def test_an_alias_and_a_remote_name_are_translated_both_ways(cast: Cast, serve: Serve, engine: Engine) -> None:
    upstream = await engine(replying(response(answer("theirs"))))

    def make() -> None:
        cast.remote(f"{upstream.url}/base/v1", {"ours": "theirs"})

    await in_database(make)
    gateway = await serve()
    reply = await gateway.chat("ours", temperature=0.5)
    assert reply.json()["model"] == "ours"
    assert upstream.requests[0].target == "/base/v1/chat/completions"
    assert upstream.requests[0].header("authorization") is None
    assert upstream.requests[0].json()["model"] == "theirs"
    assert upstream.requests[0].json()["temperature"] == 0.5


async def test_an_alias_reaches_its_model_and_is_the_name_in_the_answer(cast: Cast, serve: Serve, engine: Engine) -> None:
    upstream = await engine(good)

    def make() -> None:
        model = cast.model()
        cast.instance(model, upstream.port)
        model.aliases.create(name="org/other:latest")

    await in_database(make)
    gateway = await serve()
    reply = await gateway.chat("org/other:latest")
    assert reply.json()["model"] == "org/other:latest"
    assert upstream.requests[0].json()["model"] == "tiny"
    assert gateway.ends()[0]["model"] == "tiny"


async def test_requests_without_a_good_key_are_refused(cast: Cast, serve: Serve) -> None:
    gateway = await serve()
    missing = await gateway.client.get("/v1/models")
    assert error_of(missing) == (401, None, None)
    assert missing.headers["www-authenticate"] == "Bearer"
    noise = await gateway.get("/v1/models", headers=gateway.headers("sk-nonsense-nonsense"))
    assert error_of(noise) == (401, "invalid_api_key", None)
    assert "nonsense-nonsense" not in noise.text
    basic = await gateway.get("/v1/models", headers={"authorization": "Basic abc"})
    assert error_of(basic) == (401, None, None)
    admin, _ = await in_database(lambda: cast.key("admin", scopes=["admin"]))
    await gateway.gateway.feed.recheck()
    assert error_of(await gateway.get("/v1/models", headers=gateway.headers(admin))) == (403, "insufficient_permissions", None)
    assert (await gateway.get("/v1/models", headers={"authorization": f"bEaReR {gateway.key}"})).status_code == 200


async def test_unknown_disabled_and_forbidden_models_read_the_same(cast: Cast, serve: Serve, engine: Engine) -> None:
    upstream = await engine(good)

    def make() -> None:
        cast.model("off", enabled=False)
        cast.model("other")
        cast.instance(cast.model(), upstream.port)

    await in_database(make)
    gateway = await serve(key={"models": ["tiny"]})
    texts = set()
    for name in ("unknown", "off", "other"):
        reply = await gateway.chat(name)
        assert error_of(reply) == (404, "model_not_found", "model")
        texts.add(reply.json()["error"]["message"].replace(name, "X"))
    assert len(texts) == 1
    assert (await gateway.chat()).status_code == 200


MALFORMED: list[tuple[bytes, str | None]] = [
    (b"{", None),
    (b"[]", None),
    (b"\xff\xfe{}", None),
    (b'{"model":"tiny","messages":[{"role":"user"}],"n":NaN}', None),
    (b"[" * 100_000, None),
    (b'{"messages":[]}', "model"),
    (b'{"model":7,"messages":[]}', "model"),
    (b'{"model":"tiny"}', "messages"),
    (b'{"model":"tiny","messages":"hi"}', "messages"),
    (b'{"model":"tiny","messages":[1]}', "messages[0]"),
    (b'{"model":"tiny","messages":[{}]}', "messages[0].role"),
    (b'{"model":"tiny","messages":[{"role":"user"}],"stream":"yes"}', "stream"),
    (b'{"model":"tiny","messages":[{"role":"user"}],"stream_options":1}', "stream_options"),
    (b'{"model":"tiny","messages":[{"role":"user"}],"max_tokens":"9"}', "max_tokens"),
    (b'{"model":"tiny","messages":[{"role":"user"}],"n":0}', "n"),
]


async def test_malformed_bodies_name_the_field(serve: Serve) -> None:
    gateway = await serve()
    for body, param in MALFORMED:
        reply = await gateway.client.post("/v1/chat/completions", content=body, headers=gateway.headers())
        assert error_of(reply) == (400, None, param), body[:80]


async def test_too_large_bodies_unknown_paths_and_wrong_methods_are_json_errors(serve: Serve) -> None:
    gateway = await serve(max_body=1000)
    big = await gateway.client.post("/v1/chat/completions", content=b"x" * 1001, headers=gateway.headers())
    assert error_of(big) == (413, "request_too_large", None)

    async def pieces() -> Any:
        for _ in range(11):
            yield b"x" * 100

    chunked = await gateway.client.post("/v1/chat/completions", content=pieces(), headers=gateway.headers())
    assert error_of(chunked) == (413, "request_too_large", None)
    assert error_of(await gateway.get("/v1/nothing")) == (404, None, None)
    assert error_of(await gateway.get("/v1/models/")) == (404, None, None)
    wrong = await gateway.get("/v1/chat/completions")
    assert error_of(wrong) == (405, None, None)
    assert wrong.headers["allow"] == "POST"
    assert (await gateway.get("/admin/")).text == "console:/admin/"


async def test_models_are_listed_under_every_name_the_key_may_use(cast: Cast, serve: Serve) -> None:
    def make() -> None:
        cast.model("org/big").aliases.create(name="short")
        cast.model("off", enabled=False)
        cast.remote("http://127.0.0.1:1/v1", {"far": "x"})

    await in_database(make)
    gateway = await serve()
    listed = (await gateway.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == ["far", "org/big", "short"]
    assert {entry["object"] for entry in listed["data"]} == {"model"}
    assert (await gateway.get("/v1/models/org/big")).json()["id"] == "org/big"
    assert error_of(await gateway.get("/v1/models/off")) == (404, "model_not_found", "model")
    few, _ = await in_database(lambda: cast.key("few", models=["org/big"]))
    await gateway.gateway.feed.recheck()
    listed = (await gateway.get("/v1/models", headers=gateway.headers(few))).json()
    assert [entry["id"] for entry in listed["data"]] == ["org/big", "short"]


async def test_an_endpoint_no_backend_of_the_model_has_says_which_models_do(cast: Cast, serve: Serve) -> None:
    await in_database(lambda: cast.model("strange", engine="engine-of-the-future"))
    await in_database(lambda: cast.model("able"))
    gateway = await serve()
    reply = await gateway.chat("strange")
    assert error_of(reply) == (400, "unsupported_endpoint", "model")
    assert "able" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("engine_says", "expected"),
    [
        (failure(400, "temperature must be positive", code=400, type="invalid_request_error"), (400, None, None)),
        (failure(400, "the request exceeds the available context size", code=400), (400, "context_length_exceeded", "messages")),
        (failure(500, "context size exceeded", code=500), (400, "context_length_exceeded", "messages")),
        (failure(401, f"bad key {ENGINE_SECRET}"), (502, "upstream_error", None)),
        (failure(403, "no"), (502, "upstream_error", None)),
        (failure(404, "no model"), (502, "upstream_error", None)),
        (failure(500, ENGINE_SECRET), (502, "upstream_error", None)),
        (response(b"<html>", 200), (502, "upstream_error", None)),
        (response(b'data: {"choices": []}\n\ndata: [DONE]\n\n'), (502, "upstream_error", None)),
        (response(b"<html>" + b"x" * 5000, 400), (502, "upstream_error", None)),
        (response(b'{"error":{"message":"oops","code":500}}', 200), (502, "upstream_error", None)),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhalf", (502, "upstream_error", None)),
        (b"rubbish\r\n\r\n", (502, "upstream_error", None)),
    ],
)
async def test_what_an_engine_refuses_is_translated_once(
    cast: Cast, serve: Serve, engine: Engine, engine_says: bytes, expected: tuple[int, str | None, str | None]
) -> None:
    async def script(peer: Peer) -> None:
        await peer.read_request()
        peer.write(engine_says)
        peer.close()

    await tiny(cast, await engine(script))
    gateway = await serve()
    reply = await gateway.chat()
    assert error_of(reply) == expected
    assert ENGINE_SECRET not in reply.text
    assert gateway.idle()
    assert gateway.ends()[0]["status"] == expected[0]
    assert gateway.ends()[0]["error_code"] == (expected[1] or "")


async def test_another_backend_takes_over_and_the_failed_one_is_not_asked_again(cast: Cast, serve: Serve, engine: Engine) -> None:
    bad = await engine(replying(failure(500)))
    fine = await engine(good)

    def make() -> None:
        model = cast.model()
        for upstream in (bad, fine):
            cast.instance(model, upstream.port)

    await in_database(make)
    gateway = await serve()
    for _ in range(4):
        assert (await gateway.chat()).status_code == 200
    assert len(fine.requests) == 4
    assert 1 <= len(bad.requests) <= 4


async def test_three_backends_are_tried_and_no_fourth(cast: Cast, serve: Serve, engine: Engine) -> None:
    engines = [await engine(replying(failure(503))) for _ in range(4)]

    def make() -> None:
        model = cast.model()
        for upstream in engines:
            cast.instance(model, upstream.port)

    await in_database(make)
    gateway = await serve()
    assert error_of(await gateway.chat()) == (502, "upstream_error", None)
    assert sorted(len(upstream.requests) for upstream in engines) == [0, 1, 1, 1]


async def test_a_request_waits_for_the_restart_of_an_instance_that_is_not_there(cast: Cast, serve: Serve, engine: Engine) -> None:
    upstream = await engine(good)
    made = await in_database(lambda: cast.instance(cast.model(), 1))  # nothing listens at port 1
    gateway = await serve()
    reply = asyncio.create_task(gateway.chat())
    await until(lambda: gateway.gateway.slots.queued("tiny", "chat") == 1)

    def restarted() -> None:
        made.generation, made.port = 2, upstream.port
        made.save()

    await in_database(restarted)
    assert (await reply).status_code == 200
    assert gateway.ends()[0]["backend"] == f"instance:{made.pk}:2"


async def test_a_model_that_never_gets_ready_is_loading_and_a_crashed_one_failed(cast: Cast, serve: Serve) -> None:
    def make() -> None:
        cast.instance(cast.model("slow"), None, State.STARTING)
        cast.instance(cast.model("dead"), None, State.CRASH_LOOP, exit_reason="The file is no GGUF; fetch it again.")

    await in_database(make)
    gateway = await serve(max_wait_s=0.05)
    loading = await gateway.chat("slow")
    assert (loading.status_code, loading.json()["error"]["code"]) == (503, "model_loading")
    assert loading.json()["loading"]["state"] == "starting"
    assert loading.headers["retry-after"]
    dead = await gateway.chat("dead")
    assert error_of(dead) == (503, "model_failed", None)
    assert "GGUF" not in dead.text
    admin, _ = await in_database(lambda: cast.key("admin", scopes=["admin", "inference"]))
    await gateway.gateway.feed.recheck()
    assert "fetch it again" in (await gateway.chat("dead", key=admin)).text


async def test_a_key_may_run_only_so_many_requests_at_once(cast: Cast, serve: Serve, engine: Engine) -> None:
    proceed = asyncio.Event()

    async def slow(peer: Peer) -> None:
        await peer.read_request()
        await proceed.wait()
        peer.write(response(answer()))

    upstream = await engine(slow)
    await tiny(cast, upstream)
    gateway = await serve(key={"parallel": 1})
    first = asyncio.create_task(gateway.chat())
    await upstream.until(lambda: len(upstream.requests) == 1)
    second = await gateway.chat()
    assert error_of(second) == (429, "rate_limit_exceeded", None)
    assert second.json()["error"]["type"] == "requests"
    proceed.set()
    assert (await first).status_code == 200
    assert (await gateway.chat()).status_code == 200


async def test_waiters_are_served_in_order_and_sent_away_when_told_not_to_wait(cast: Cast, serve: Serve, engine: Engine) -> None:
    gates = [asyncio.Event() for _ in range(4)]

    async def gated(peer: Peer) -> None:
        request = await peer.read_request()
        await gates[request.json()["seed"]].wait()
        peer.write(response(answer()))

    upstream = await engine(gated)
    await tiny(cast, upstream, slots=1)
    gateway = await serve()
    calls = []
    for seed in range(4):
        calls.append(asyncio.create_task(gateway.chat(seed=seed)))
        await until(lambda: gateway.gateway.slots.waiting + len(upstream.requests) == len(calls))
    assert error_of(await gateway.chat(headers={"prefer": "wait=0"})) == (503, "queue_timeout", None)
    for gate, call in zip(gates, calls, strict=True):
        gate.set()
        assert (await call).status_code == 200
    assert [request.json()["seed"] for request in upstream.requests] == [0, 1, 2, 3]
    assert gateway.idle()


async def test_the_clients_request_id_is_echoed_only_if_it_is_sane(cast: Cast, serve: Serve, engine: Engine) -> None:
    upstream = await engine(good)
    await tiny(cast, upstream)
    gateway = await serve()
    reply = await gateway.chat(headers={"x-request-id": "my-id.1"})
    assert reply.headers["x-request-id"] == "my-id.1"
    assert upstream.requests[0].header("x-request-id") == "my-id.1"
    twice = await gateway.chat(headers={"x-request-id": "my-id.1"})
    assert twice.headers["x-request-id"] == "my-id.1"
    assert len({end["id"] for end in gateway.ends()}) == 2  # metered twice all the same
    odd = await gateway.chat(headers={"x-request-id": "bad id"})
    assert odd.headers["x-request-id"].startswith("req-")


async def test_plain_completions_go_to_their_own_path(cast: Cast, serve: Serve, engine: Engine) -> None:
    upstream = await engine(good)
    await tiny(cast, upstream)
    gateway = await serve()

    async def complete(**fields: Any) -> httpx.Response:
        body = {"model": "tiny", **fields}
        return await gateway.client.post("/v1/completions", json=body, headers=gateway.headers())

    assert (await complete(prompt="Once")).status_code == 200
    assert upstream.requests[0].target == "/v1/completions"
    assert error_of(await complete()) == (400, None, "prompt")
    assert error_of(await complete(prompt={})) == (400, None, "prompt")
    assert gateway.ends()[0]["endpoint"] == "/v1/completions"


async def test_no_counter_leaks_over_many_outcomes(cast: Cast, serve: Serve, engine: Engine) -> None:
    outcomes = [response(answer()), failure(400), failure(500), b"rubbish\r\n\r\n", b""]

    async def varied(peer: Peer) -> None:
        request = await peer.read_request()
        seed = request.json()["seed"]
        peer.write(outcomes[seed % len(outcomes)])
        if seed % len(outcomes) >= 2:
            peer.close()

    upstream = await engine(varied)
    await tiny(cast, upstream, slots=3)
    gateway = await serve()

    async def one(seed: int) -> None:
        if seed % 7 == 0:
            _, writer = await gateway.open_chat(seed=seed)
            writer.close()
        else:
            await gateway.chat(seed=seed)

    for batch in range(10):
        await asyncio.gather(*(one(batch * 20 + number) for number in range(20)))
    await until(lambda: gateway.count_ends() == 200)
    assert gateway.idle()
    assert_nothing_is_held(gateway)


def assert_nothing_is_held(gateway: Served) -> None:
    records = gateway.gateway.keys.table.find(gateway.key)
    assert records is not None
    assert gateway.gateway.limits.running(records) == 0
    assert gateway.gateway.slots.waiting == 0


async def test_a_model_made_a_moment_ago_is_served_at_once(cast: Cast, serve: Serve, engine: Engine) -> None:
    upstream = await engine(good)
    gateway = await serve()
    await in_database(lambda: cast.instance(cast.model(), upstream.port))
    reply = await gateway.chat()
    assert reply.status_code == 200
    assert gateway.ends()[0]["status"] == 200
