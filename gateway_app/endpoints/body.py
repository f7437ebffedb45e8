"""Request bodies of chat completions, completions and embeddings: checked once, changed as little as possible.

Pure: no Django, no I/O.

The engine gets the client's own bytes. Only the model's name, and the wish for usage at the end of a stream, are spliced in;
where that is not plainly safe (a key twice or written with escapes, options that must be merged) the body is written anew
from what was parsed, so that gateway and engine can never read two different requests out of one body.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from gateway_app import errors
from models_app.contracts.traits import CHAT, COMPLETIONS, EMBEDDINGS

_MODEL = re.compile(rb'"model"\s*:\s*("[^"\\]*")')
_OPENING = re.compile(rb"\s*\{")
_WANT_USAGE = b'{"stream_options":{"include_usage":true},'
_DECIDING = (b'"model"', b'"stream"', b'"stream_options"')


@dataclass(frozen=True, slots=True)
class Call:
    """A checked request. wants_usage: the client asked for the usage event of a stream."""

    model: str
    stream: bool
    wants_usage: bool
    raw: bytes
    fields: dict[str, Any]

    def body_for(self, model_name: str) -> bytes:
        """What to send to a backend that knows the model by this name."""
        add_usage = self.stream and not self.wants_usage
        merge = add_usage and "stream_options" in self.fields
        if merge or not _spliceable(self.raw):
            return self._written_anew(model_name, add_usage)
        body = self.raw
        if model_name != self.model:
            found = _MODEL.search(body)
            if found is None or found[1] != json.dumps(self.model, ensure_ascii=False).encode():
                return self._written_anew(model_name, add_usage)
            body = body[: found.start(1)] + json.dumps(model_name).encode() + body[found.end(1) :]
        return _OPENING.sub(lambda _: _WANT_USAGE, body, count=1) if add_usage else body

    def _written_anew(self, model_name: str, add_usage: bool) -> bytes:
        fields = {**self.fields, "model": model_name}
        if add_usage:
            fields["stream_options"] = {**(fields.get("stream_options") or {}), "include_usage": True}
        try:
            return json.dumps(fields, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
        except (ValueError, RecursionError):  # a number too large for a float, half a surrogate pair, nested beyond reason
            raise errors.invalid_request("The request body holds a value that JSON cannot carry.") from None


def _spliceable(raw: bytes) -> bool:
    """Whether each key that decides anything stands here at most once, in plain letters (escapes of ASCII begin with \\u00)."""
    return b"\\u00" not in raw and all(raw.count(key) <= 1 for key in _DECIDING)


def parse(raw: bytes, endpoint: str) -> Call:
    """The body checked. Raises invalid_request naming the field at fault."""
    fields = _object(raw)
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise _wrong("model", "a non-empty string") if "model" in fields else _missing("model")
    _CHECKS[endpoint](fields)
    stream = fields.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise _wrong("stream", "a boolean")
    options = fields.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise _wrong("stream_options", "an object")
    for name, least in (("max_tokens", 0), ("max_completion_tokens", 0), ("n", 1)):
        value = fields.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise _wrong(name, f"an integer of at least {least}")
    wants_usage = bool(stream) and options is not None and options.get("include_usage") is True
    return Call(model, bool(stream), wants_usage, raw, fields)


def _object(raw: bytes) -> dict[str, Any]:
    try:
        fields = _DECODER.decode(raw.decode())
    except UnicodeDecodeError:
        raise errors.invalid_request("The request body is not UTF-8.") from None
    except ValueError as error:
        raise errors.invalid_request(f"The request body is not valid JSON: {error}.") from None
    except RecursionError:
        raise errors.invalid_request("The request body is nested too deeply.") from None
    if not isinstance(fields, dict):
        raise errors.invalid_request("The request body must be a JSON object.")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)  # json.loads would make one for every body


def _check_messages(fields: dict[str, Any]) -> None:
    messages = fields.get("messages")
    if messages is None:
        raise _missing("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "a non-empty array")
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _wrong(f"messages[{place}]", "an object")
        if not isinstance(message.get("role"), str):
            raise _wrong(f"messages[{place}].role", "a string")


def _check_prompt(fields: dict[str, Any]) -> None:
    prompt = fields.get("prompt")
    if prompt is None:
        raise _missing("prompt")
    if not isinstance(prompt, str | list):
        raise _wrong("prompt", "a string or an array")
    if isinstance(prompt, list) and not all(isinstance(part, str | list | int) for part in prompt):
        raise _wrong("prompt", "a string, an array of strings, or arrays of token numbers")


def _check_input(fields: dict[str, Any]) -> None:
    texts = fields.get("input")
    if texts is None:
        raise _missing("input")
    if not isinstance(texts, str | list) or not texts:
        raise _wrong("input", "a non-empty string or array")
    if isinstance(texts, list) and not all(isinstance(part, str | list | int) and part != "" for part in texts):
        raise _wrong("input", "a string, an array of non-empty strings, or arrays of token numbers")
    if fields.get("encoding_format") not in (None, "float", "base64"):
        raise _wrong("encoding_format", "'float' or 'base64'")
    if fields.get("stream"):
        raise errors.invalid_request("Embeddings are not streamed.", "stream")


_CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    CHAT: _check_messages,
    COMPLETIONS: _check_prompt,
    EMBEDDINGS: _check_input,
}


def _missing(field: str) -> errors.ApiError:
    return errors.invalid_request(f"Missing required parameter: '{field}'.", field)


def _wrong(field: str, expected: str) -> errors.ApiError:
    return errors.invalid_request(f"Invalid type for '{field}': expected {expected}.", field)
