"""Embeddings through the gateway: a process of their own, vectors passed on as they come, usage learnt beside them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from gateway_app.sse import Usage, read_embedding_usage
from models_app.models import State
from tests.fakes.scripted_upstream import response
from tests.gateway.conftest import Cast, Engine, Serve, Served, in_database
from tests.gateway.test_inference import replying

VECTORS: dict[str, Any] = {
    "model": "tiny",
    "object": "list",
    "usage": {"prompt_tokens": 9, "total_tokens": 9},
    "data": [{"object": "embedding", "index": number, "embedding": [0.25 * number] * 600} for number in range(3)],
}


async def embed(gateway: Served, model: str = "tiny", **fields: Any) -> httpx.Response:
    body = {"model": model, "input": ["a", "b", "c"], **fields}
    return await gateway.client.post("/v1/embeddings", json=body, headers=gateway.headers())


async def test_embeddings_go_to_the_process_that_has_them_and_their_tokens_are_counted(
    cast: Cast, serve: Serve, engine: Engine
) -> None:
    chat, vectors = await engine(replying(response(b"{}"))), await engine(replying(response(json.dumps(VECTORS).encode())))

    def make() -> None:
        both = cast.model(embedding_model_path="/models/embed.gguf")
        cast.instance(both, chat.port, State.READY)
        cast.instance(both, vectors.port, State.READY, part="embedding")

    await in_database(make)
    gateway = await serve()
    reply = await embed(gateway)
    assert reply.json() == VECTORS
    assert (len(chat.requests), len(vectors.requests)) == (0, 1)
    assert vectors.requests[0].target == "/v1/embeddings"
    (end,) = gateway.ends()
    assert (end["prompt"], end["completion"], end["end"], end["status"]) == (9, 0, "stop", 200)
    assert gateway.idle()


async def test_a_model_without_embeddings_says_so(cast: Cast, serve: Serve, engine: Engine) -> None:
    upstream = await engine(replying(response(b"{}")))
    await in_database(lambda: cast.instance(cast.model(), upstream.port))
    gateway = await serve()
    reply = await embed(gateway)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unsupported_endpoint")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"stream": True}, "stream"),
    ],
)
async def test_a_wrong_body_is_refused_naming_the_field(cast: Cast, serve: Serve, fields: dict[str, Any], param: str) -> None:
    await in_database(cast.model)
    gateway = await serve()
    reply = await embed(gateway, **fields)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_an_input_that_is_too_long_names_the_field_that_holds_it(cast: Cast, serve: Serve, engine: Engine) -> None:
    said = json.dumps({"error": {"code": 500, "message": "input (862 tokens) is too large to process."}}).encode()
    upstream = await engine(replying(response(said, 500)))

    def make() -> None:
        model = cast.model(embedding_model_path="/models/e.gguf")
        cast.instance(model, upstream.port, part="embedding")

    await in_database(make)
    gateway = await serve()
    error = (await embed(gateway)).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")


@pytest.mark.parametrize("order", [["usage", "data"], ["data", "usage"]])
def test_usage_is_found_at_either_end(order: list[str]) -> None:
    body = json.dumps({name: VECTORS[name] for name in order}).encode()
    assert len(body) > 4096
    assert read_embedding_usage(body) == (Usage(9, 0), None)


def test_an_answer_without_usage_has_none_and_an_error_is_no_answer() -> None:
    assert read_embedding_usage(b'{"data": [{"embedding": [1]}]}') == (None, None)
    with pytest.raises(ValueError, match="embeddings"):
        read_embedding_usage(b'{"error": {"message": "no"}}')
