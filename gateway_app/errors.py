"""Every error a caller of /v1 can get, one constructor per case, shared by HTTP and gRPC. Pure: no Django, no I/O.

The body is always `{"error": {"message": str, "type": str, "param": str|null, "code": str|null}}` in ASCII JSON; codes are
strings or null, never numbers. What an engine says is translated here, once (`from_engine`), and never passed on as it came.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Literal

Headers = tuple[tuple[bytes, bytes], ...]

INVALID_REQUEST: Final = "invalid_request_error"
SERVER_ERROR: Final = "server_error"
INSUFFICIENT_QUOTA: Final = "insufficient_quota"

_CHALLENGE: Final[Headers] = ((b"www-authenticate", b"Bearer"),)
_NEVER_RETRY: Final[Headers] = ((b"x-should-retry", b"false"),)
_REPEATED = 2000  # characters of an engine's refusal repeated to the caller
_SHOWN = 200  # characters of a caller's own text repeated in a message

_dumps = json.JSONEncoder(ensure_ascii=True).encode


@lru_cache(maxsize=256)
def _tail(type_: str, param: str | None, code: str | None) -> bytes:
    """Everything of the error object after its message; the same few dozen values come again and again."""
    return f', "type": {_dumps(type_)}, "param": {_dumps(param)}, "code": {_dumps(code)}}}'.encode("ascii")


class ApiError(Exception):
    """An answer that ends a request.

    headers: what goes with it besides content-type, content-length and x-request-id; names in lower case.
    extra: members beside "error" in the body (only model_loading has one).
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str,
        code: str | None = None,
        param: str | None = None,
        headers: Headers = (),
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.headers = headers
        self.extra = extra

    def body(self) -> bytes:
        """The JSON answer."""
        error = b'{"error": {"message": ' + _dumps(self.message).encode("ascii") + _tail(self.type, self.param, self.code)
        if not self.extra:
            return error + b"}"
        return error + b", " + _dumps(dict(self.extra)).encode("ascii")[1:]

    def event(self) -> bytes:
        """The same inside a stream that has begun; no [DONE] may follow it."""
        return b"data: " + self.body() + b"\n\n"


def _shown(text: str) -> str:
    """A caller's own text, short enough to repeat."""
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _retry_after(seconds: float) -> Headers:
    """Whole seconds, rounded up, at least one: zero would invite a busy loop."""
    return ((b"retry-after", b"%d" % max(1, math.ceil(seconds))),)


# --- who is asking -----------------------------------------------------------------------------------------------------


def missing_key() -> ApiError:
    """401: no key was sent."""
    return ApiError(
        401,
        "You didn't provide an API key. Send it in an Authorization header: 'Authorization: Bearer YOUR_KEY'.",
        INVALID_REQUEST,
        headers=_CHALLENGE,
    )


def invalid_key(masked: str) -> ApiError:
    """401: unknown, revoked or expired, told apart to nobody. masked: what may be shown of the key."""
    message = f"Incorrect API key provided: {_shown(masked)}. Ask an administrator for a valid key."
    return ApiError(401, message, INVALID_REQUEST, "invalid_api_key", headers=_CHALLENGE)


def auth_backend_unavailable() -> ApiError:
    """503: keys cannot be checked just now; never 401, which would make clients throw their key away."""
    message = "API keys cannot be checked at the moment. Please try again shortly."
    return ApiError(503, message, SERVER_ERROR, "auth_backend_unavailable", headers=_retry_after(1))


def insufficient_permissions(needed: str) -> ApiError:
    """403: the key lacks a scope."""
    message = f"This API key lacks the scope '{_shown(needed)}' that this request needs."
    return ApiError(403, message, INVALID_REQUEST, "insufficient_permissions")


# --- what is asked -----------------------------------------------------------------------------------------------------


def model_not_found(name: str) -> ApiError:
    """404: unknown, disabled and not allowed for this key read the same, so that names cannot be probed."""
    message = f"The model `{_shown(name)}` does not exist or you do not have access to it."
    return ApiError(404, message, INVALID_REQUEST, "model_not_found", "model")


def unsupported_endpoint(path: str, model: str, models: Sequence[str] = ()) -> ApiError:
    """400: the model's engine does not have this endpoint. models: those the caller may use that do."""
    remedy = f" Models that do: {', '.join(models)}." if models else ""
    message = f"The model `{_shown(model)}` does not support {_shown(path)}.{remedy}"
    return ApiError(400, message, INVALID_REQUEST, "unsupported_endpoint", "model")


def invalid_request(message: str, param: str | None = None) -> ApiError:
    """400: malformed JSON or a wrong type. param: the field at fault."""
    return ApiError(400, message, INVALID_REQUEST, None, param)


def context_length_exceeded(message: str, param: str = "messages") -> ApiError:
    """400: the prompt does not fit the model's context. param: the field that holds it."""
    return ApiError(400, message, INVALID_REQUEST, "context_length_exceeded", param)


def request_too_large(limit: int) -> ApiError:
    """413: the body passes the limit, in bytes."""
    size = f"{limit // 2**20} MiB" if limit >= 2**20 and limit % 2**20 == 0 else f"{limit} bytes"
    return ApiError(413, f"The request body is larger than {size}.", INVALID_REQUEST, "request_too_large")


def unknown_path(path: str) -> ApiError:
    """404: nothing lives at this path."""
    return ApiError(404, f"Unknown request URL: {_shown(path)}.", INVALID_REQUEST)


def method_not_allowed(method: str, allowed: Sequence[str]) -> ApiError:
    """405 with the methods that are allowed."""
    listed = ", ".join(allowed)
    message = f"Method {_shown(method)} is not allowed here; use {listed}."
    return ApiError(405, message, INVALID_REQUEST, headers=((b"allow", listed.encode("latin-1")),))


# --- limits ------------------------------------------------------------------------------------------------------------


def rate_limit_exceeded(
    kind: Literal["requests", "tokens"], message: str, retry_after_s: float, limits: Headers = ()
) -> ApiError:
    """429: too many requests or tokens a minute. limits: the x-ratelimit-* headers."""
    exact = (b"retry-after-ms", b"%d" % max(1, math.ceil(retry_after_s * 1000)))
    return ApiError(429, message, kind, "rate_limit_exceeded", headers=(*_retry_after(retry_after_s), exact, *limits))


def insufficient_quota(message: str) -> ApiError:
    """429: the budget is used up; trying again does not help, and the client library is told so."""
    return ApiError(429, message, INSUFFICIENT_QUOTA, "insufficient_quota", headers=_NEVER_RETRY)


def server_overloaded(retry_after_s: float) -> ApiError:
    """429: the queue is full. retry_after_s: from the rate at which it drains."""
    message = "The server is at capacity and its queue is full. Please try again later."
    return ApiError(429, message, SERVER_ERROR, "server_overloaded", headers=_retry_after(retry_after_s))


def queue_timeout() -> ApiError:
    """503: waited too long for a free slot."""
    message = "The request waited too long for a free slot. Please try again later."
    return ApiError(503, message, SERVER_ERROR, "queue_timeout", headers=_retry_after(1))


# --- engines -----------------------------------------------------------------------------------------------------------


def model_loading(eta_s: float | None, state: str = "starting", progress: float | None = None, detail: str = "") -> ApiError:
    """503 with `loading: {state, progress, eta_s}` beside the error. eta_s: None while nobody can tell.

    state: "waiting" where the load has not begun; detail says in a sentence what it waits for.
    """
    now = "The model waits to be loaded." if state == "waiting" else "The model is being loaded."
    because = f" {detail}" if detail else ""
    expected = f" It should be ready in about {max(1, math.ceil(eta_s))} s." if eta_s is not None else ""
    return ApiError(
        503,
        f"{now}{because}{expected} Please try again {'shortly' if eta_s is None else 'then'}.",
        SERVER_ERROR,
        "model_loading",
        headers=_retry_after(5 if eta_s is None else eta_s),
        extra={"loading": {"state": state, "progress": progress, "eta_s": eta_s}},
    )


def model_failed(reason: str) -> ApiError:
    """503: the model does not load. reason: diagnosis and remedy for administrators, a plain sentence for others."""
    return ApiError(503, reason, SERVER_ERROR, "model_failed")


def upstream_error() -> ApiError:
    """502: every try failed before the first byte."""
    return ApiError(502, "The model's server failed to answer. Please try again.", SERVER_ERROR, "upstream_error")


def upstream_stream_interrupted() -> ApiError:
    """In-band (502 for the record): the model's server broke off after the stream had begun."""
    message = "The model's server broke off before the answer was complete."
    return ApiError(502, message, SERVER_ERROR, "upstream_stream_interrupted")


_ADVICE = "increase the physical batch size"  # what llama.cpp says to whoever launched it
_CONTEXT_PHRASES = ("context size", "context length", "context window", "context_length", "maximum context")


def _is_context_error(kind: object, code: object, message: str) -> bool:
    if kind == "exceed_context_size_error" or code == "context_length_exceeded":
        return True
    lowered = message.lower()
    if "too large to process" in lowered:  # llama.cpp of an input to embed that does not fit into one piece, with status 500
        return True
    return any(phrase in lowered for phrase in _CONTEXT_PHRASES) and (
        "exceed" in lowered or "larger" in lowered or "too l" in lowered
    )


def from_engine(status: int, error: object, prompt: str = "messages") -> ApiError:
    """What an engine answered, as one of ours.

    status: of its answer, 200 where the error came inside a stream. error: the "error" member (an object or a text), or
    anything else when there was none. prompt: the field of the request that holds what the model reads.
    Refusals of the request are repeated in the engine's words; an engine that refuses *us* (401, 403, 404), breaks (5xx) or
    talks nonsense is our trouble and told as a plain sentence.
    """
    fields: Mapping[Any, Any] = error if isinstance(error, Mapping) else {}
    message = fields.get("message", error)
    if not isinstance(message, str) or message.lstrip().startswith("<"):  # a page of a proxy is not the engine's word
        message = ""
    message = message[:_REPEATED]
    code, kind = fields.get("code"), fields.get("type")
    if status < 400 and isinstance(code, int) and not isinstance(code, bool):
        status = code
    if _is_context_error(kind, code, message):
        said = message.partition(_ADVICE)[0].rstrip()
        return context_length_exceeded(said or "The prompt is longer than the model's context.", prompt)
    if status == 429:
        return server_overloaded(1)
    if status == 503:
        return model_loading(None) if "loading" in message.lower() else upstream_error()
    if message and (status in (400, 413, 415, 422) or (status < 400 and kind == INVALID_REQUEST)):
        param = fields.get("param")
        return invalid_request(message, param if isinstance(param, str) else None)
    return upstream_error()
