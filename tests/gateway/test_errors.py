"""The error table: what each case says, to the letter."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from gateway_app import errors
from gateway_app.errors import ApiError

INVALID, SERVER = "invalid_request_error", "server_error"

TABLE: list[tuple[ApiError, int, str, str | None, str | None]] = [
    (errors.missing_key(), 401, INVALID, None, None),
    (errors.invalid_key("ast_abcd****yz"), 401, INVALID, "invalid_api_key", None),
    (errors.auth_backend_unavailable(), 503, SERVER, "auth_backend_unavailable", None),
    (errors.insufficient_permissions("admin"), 403, INVALID, "insufficient_permissions", None),
    (errors.model_not_found("x"), 404, INVALID, "model_not_found", "model"),
    (errors.unsupported_endpoint("/v1/embeddings", "x"), 400, INVALID, "unsupported_endpoint", "model"),
    (errors.invalid_request("'temperature' must be a number.", "temperature"), 400, INVALID, None, "temperature"),
    (errors.context_length_exceeded("Too long."), 400, INVALID, "context_length_exceeded", "messages"),
    (errors.request_too_large(32 * 2**20), 413, INVALID, "request_too_large", None),
    (errors.unknown_path("/v1/nothing"), 404, INVALID, None, None),
    (errors.method_not_allowed("PUT", ["GET", "HEAD"]), 405, INVALID, None, None),
    (errors.rate_limit_exceeded("tokens", "Too many tokens.", 0.25), 429, "tokens", "rate_limit_exceeded", None),
    (errors.insufficient_quota("Used up."), 429, "insufficient_quota", "insufficient_quota", None),
    (errors.server_overloaded(3), 429, SERVER, "server_overloaded", None),
    (errors.queue_timeout(), 503, SERVER, "queue_timeout", None),
    (errors.model_loading(12), 503, SERVER, "model_loading", None),
    (errors.model_failed("The model file is missing."), 503, SERVER, "model_failed", None),
    (errors.upstream_error(), 502, SERVER, "upstream_error", None),
    (errors.upstream_stream_interrupted(), 502, SERVER, "upstream_stream_interrupted", None),
]


@pytest.mark.parametrize(("error", "status", "kind", "code", "param"), TABLE, ids=[row[0].message[:30] for row in TABLE])
def test_a_case_has_its_status_type_code_and_param(
    error: ApiError, status: int, kind: str, code: str | None, param: str | None
) -> None:
    body = json.loads(error.body())["error"]
    assert (error.status, error.type, error.code, error.param) == (status, kind, code, param)
    assert body == {"message": error.message, "type": kind, "param": param, "code": code}
    assert error.message.endswith(".")
    assert str(error) == error.message


@pytest.mark.parametrize("error", [row[0] for row in TABLE], ids=[row[0].message[:30] for row in TABLE])
def test_the_event_says_what_the_body_says_on_one_line(error: ApiError) -> None:
    assert error.event() == b"data: " + error.body() + b"\n\n"
    assert b"\n" not in error.body()


def test_both_401_challenge_for_a_bearer_key() -> None:
    for error in (errors.missing_key(), errors.invalid_key("ast_****")):
        assert (b"www-authenticate", b"Bearer") in error.headers


def test_an_unavailable_key_store_is_never_401_and_tells_when_to_retry() -> None:
    assert dict(errors.auth_backend_unavailable().headers) == {b"retry-after": b"1"}


@pytest.mark.parametrize(("seconds", "header"), [(0, b"1"), (0.2, b"1"), (1, b"1"), (1.01, b"2"), (90, b"90")])
def test_retry_after_is_whole_seconds_rounded_up_and_never_zero(seconds: float, header: bytes) -> None:
    for error in (errors.server_overloaded(seconds), errors.model_loading(seconds)):
        assert dict(error.headers)[b"retry-after"] == header


def test_a_rate_limit_tells_the_exact_wait_and_the_limits() -> None:
    limits = ((b"x-ratelimit-limit-requests", b"60"),)
    error = errors.rate_limit_exceeded("requests", "Too many requests.", 1.2345, limits)
    assert dict(error.headers) == {b"retry-after": b"2", b"retry-after-ms": b"1235", b"x-ratelimit-limit-requests": b"60"}


def test_a_used_up_budget_tells_the_client_library_not_to_retry() -> None:
    assert errors.insufficient_quota("Used up.").headers == ((b"x-should-retry", b"false"),)


def test_loading_says_how_far_it_is_beside_the_error() -> None:
    body = json.loads(errors.model_loading(4.5, "starting", 0.5).body())
    assert body["loading"] == {"state": "starting", "progress": 0.5, "eta_s": 4.5}
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_loading_without_an_estimate_still_says_when_to_retry() -> None:
    error = errors.model_loading(None)
    assert json.loads(error.body())["loading"]["eta_s"] is None
    assert int(dict(error.headers)[b"retry-after"]) >= 1


def test_a_method_that_is_not_allowed_is_told_which_are() -> None:
    assert errors.method_not_allowed("PUT", ["GET", "HEAD"]).headers == ((b"allow", b"GET, HEAD"),)


def test_an_endpoint_an_engine_lacks_names_models_that_have_it() -> None:
    assert "Models that do: a, b." in errors.unsupported_endpoint("/v1/embeddings", "x", ["a", "b"]).message


def test_the_body_limit_is_told_in_units_people_read() -> None:
    assert "32 MiB" in errors.request_too_large(32 * 2**20).message
    assert "1000 bytes" in errors.request_too_large(1000).message


@pytest.mark.parametrize("text", ['q"uo\\te\n', "naïve 模型 😀", "\ud800 lone surrogate", "\x00"])
@pytest.mark.parametrize("make", [errors.model_not_found, errors.invalid_key, errors.unknown_path, errors.invalid_request])
def test_any_text_of_a_caller_becomes_plain_ascii_json(make: Callable[[str], ApiError], text: str) -> None:
    body = make(text).body()
    assert body.isascii()
    assert text in json.loads(body)["error"]["message"]


def test_a_very_long_name_is_not_repeated_whole() -> None:
    assert len(errors.model_not_found("x" * 100_000).body()) < 1000


# --- what engines say --------------------------------------------------------------------------------------------------

LLAMA_CONTEXT = {
    "code": 400,
    "message": "request (5030 tokens) exceeds the available context size (2048 tokens), try increasing it",
    "type": "exceed_context_size_error",
    "n_prompt_tokens": 5030,
    "n_ctx": 2048,
}


@pytest.mark.parametrize("status", [400, 500, 200])
def test_a_prompt_that_does_not_fit_is_one_error_however_the_engine_says_it(status: int) -> None:
    error = errors.from_engine(status, LLAMA_CONTEXT)
    assert (error.status, error.code, error.param) == (400, "context_length_exceeded", "messages")
    assert "5030 tokens" in error.message


def test_an_input_that_cannot_be_embedded_in_one_piece_is_the_client_s_to_shorten() -> None:
    said = "input (862 tokens) is too large to process. increase the physical batch size (current batch size: 512)"
    error = errors.from_engine(500, {"code": 500, "message": said, "type": "server_error"})
    assert (error.status, error.code) == (400, "context_length_exceeded")
    assert error.message == "input (862 tokens) is too large to process."  # the rest is advice to whoever launched it


@pytest.mark.parametrize(
    "said",
    [
        {"message": "This model's maximum context length is 2048 tokens; your prompt is too long.", "code": 400},
        {"message": "input is larger than the max context size. skipped", "code": 500, "type": "server_error"},
        {"message": "too big", "code": "context_length_exceeded"},
    ],
)
def test_other_words_for_a_prompt_that_does_not_fit_are_understood(said: dict[str, Any]) -> None:
    assert errors.from_engine(500, said).code == "context_length_exceeded"


def test_an_engines_words_are_repeated_at_bounded_length() -> None:
    assert len(errors.from_engine(400, "no " * 20_000).message) < 5000


def test_a_refused_request_is_told_in_the_words_of_the_engine_without_its_numeric_code() -> None:
    error = errors.from_engine(400, {"code": 400, "message": "'messages' is required", "type": INVALID, "param": "messages"})
    assert (error.status, error.message, error.code, error.param) == (400, "'messages' is required", None, "messages")


def test_the_code_inside_a_stream_stands_for_the_status() -> None:
    assert errors.from_engine(200, {"code": 400, "message": "Bad grammar"}).status == 400
    assert errors.from_engine(200, {"code": 500, "message": "Decode failed"}).code == "upstream_error"


@pytest.mark.parametrize("status", [401, 403, 404, 500, 501, 502, 504])
def test_an_engine_that_refuses_us_or_breaks_is_an_upstream_error_without_its_words(status: int) -> None:
    error = errors.from_engine(status, {"code": status, "message": "Invalid API Key sk-secret", "type": "authentication_error"})
    assert (error.status, error.code) == (502, "upstream_error")
    assert "sk-secret" not in error.message


def test_a_loading_engine_and_a_full_one_keep_their_meaning() -> None:
    assert errors.from_engine(503, {"code": 503, "message": "Loading model", "type": "unavailable_error"}).code == "model_loading"
    assert errors.from_engine(429, {"message": "slow down"}).code == "server_overloaded"
    assert errors.from_engine(503, {"message": "down"}).code == "upstream_error"


@pytest.mark.parametrize("said", [None, "", 7, [], {}, {"message": None}, {"message": {"deep": 1}}, {"code": True}])
@pytest.mark.parametrize("status", [200, 400, 500])
def test_nonsense_from_an_engine_is_an_upstream_error(status: int, said: object) -> None:
    error = errors.from_engine(status, said)
    assert (error.status, error.code) == (502, "upstream_error")


def test_a_plain_text_refusal_is_repeated() -> None:
    assert errors.from_engine(400, "grammar does not parse").message == "grammar does not parse"
