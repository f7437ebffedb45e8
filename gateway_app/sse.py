"""Relaying an OpenAI-shaped event stream while looking at it from the side. Pure: no Django, no I/O.

Bytes are never written anew. What changes is spliced: the model's name where the client used another one, a role that the
engine left out of a choice's first delta. What is dropped is dropped whole: the usage event nobody asked for, the engine's
own error event (the caller answers with ours instead) and everything after it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from gateway_app.event_payload import Edit, Payload, event_end
from gateway_app.event_shape import MAX_EVENT, EventShape, brings_text, learn_shape
from gateway_app.json_spans import document

_CONTENT_NAMES: Final = ("content", "reasoning_content", "tool_calls", "reasoning", "refusal", "function_call")
_DONE: Final = b"data: [DONE]"
_LAST: Final = _DONE + b"\r\n\r\n"
_EMBEDDING_USAGE: Final = re.compile(rb'"usage"\s*:\s*(\{[^{}]*\})')
_NEAR_AN_END: Final = 4096  # bytes at either end of an answer where its usage stands
_LESSONS: Final = 4  # events whose shape is learnt before a learnt shape has proved useful


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request, as the engine counted them. cached_tokens: None where it does not say."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None


# --- whole answers -----------------------------------------------------------------------------------------------------


def splice_model(body: bytes, name: str) -> bytes:
    """A whole JSON answer with its first top-level "model" replaced and every other byte kept; as it is if it has none."""
    try:
        model = document(body.decode("latin-1")).get("model")
    except (ValueError, RecursionError):
        return body
    if model is None or not isinstance(model.value, str):
        return body
    if json.loads(body[model.start : model.end].decode("utf-8", "replace")) == name:
        return body
    return body[: model.start] + json.dumps(name).encode("ascii") + body[model.end :]


def read_usage(body: bytes) -> tuple[Usage | None, str | None]:
    """Usage and the first finish_reason of a whole answer; None for what it does not say. Raises ValueError if it is none."""
    try:
        top = json.loads(body)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    choices = top.get("choices") if isinstance(top, dict) else None
    if not isinstance(choices, list):
        raise ValueError("not an object with choices")  # noqa: TRY004  # one error for whatever is no answer
    reasons = [_finish_reason(choice) for choice in choices]
    return _usage(top.get("usage")), next((reason for reason in reasons if reason), None)


def read_embedding_usage(body: bytes) -> tuple[Usage | None, str | None]:
    """As read_usage, of an answer with embeddings: its thousands of numbers are not read. Raises ValueError if it is none."""
    if b'"data"' not in body or b'"embedding"' not in body:
        raise ValueError("not an answer with embeddings")
    found = _EMBEDDING_USAGE.search(body[:_NEAR_AN_END]) or _EMBEDDING_USAGE.search(body[-_NEAR_AN_END:])
    usage = _usage({"completion_tokens": 0, **json.loads(found[1])}) if found else None
    return usage, None


# --- streams -----------------------------------------------------------------------------------------------------------


class StreamScanner:
    """Takes a stream as it arrives and gives back what to relay: always whole events, so that ours may follow at any time.

    client_model: the name the client used, put in the place of the engine's; None to leave the name alone.
    keep_usage: whether the client asked for the usage event (`choices: []` with usage).

    saw_event: an event with data has come (a comment is none). saw_content: something the model wrote has come.
    content_events: how many events brought something. done: [DONE] has come. usage, finish_reason: as far as they have come.
    error: the engine's own error, if it sent one; that event and all that follows is withheld, so the caller must say it.
    overflowed: an event was longer than MAX_EVENT, and since then bytes pass unseen and untouched.
    """

    def __init__(self, client_model: str | None, keep_usage: bool) -> None:
        self.saw_event = False
        self.saw_content = False
        self.content_events = 0
        self.done = False
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.error: dict[str, Any] | None = None
        self.overflowed = False
        self._client_model = client_model
        self._name = json.dumps(client_model).encode("ascii")
        self._keep_usage = keep_usage
        self._held = bytearray()  # the beginning of an event that has not ended; at most MAX_EVENT
        self._end = b""  # of what passed unseen
        self._roles: set[int] = set()  # choices that have had a role
        self._shape: EventShape | None = None
        self._lessons = _LESSONS

    def feed(self, data: bytes) -> bytes:
        """What to relay now that these bytes have come; b"" while an event is incomplete."""
        if self.overflowed:
            self._end = (self._end + data)[-len(_LAST) :]
            return data
        if self.error is not None:
            return b""
        held = self._held
        if held:
            start = max(0, len(held) - 3)
            held += data
            if event_end(held, start) < 0:
                return self._overflow([], b"") if len(held) > MAX_EVENT else b""
            data = bytes(held)
            held.clear()
        return self._relay(data)

    def finish(self) -> bytes:
        """What to relay when the upstream has ended properly: a last event that lacks its blank line."""
        self.done = self.done or _DONE in self._end
        data = bytes(self._held)
        self._held.clear()
        return self._read(data) if data and self.error is None else b""

    def _relay(self, data: bytes) -> bytes:
        """Event by event: by shape where one is known and fits, by parsing where not. What is left over is held."""
        out: list[bytes] = []
        at, size = 0, len(data)
        while at < size:
            if self._shape is not None:
                start = at
                at, brought = self._shape.relay(data, at, out)
                if at > start:
                    self.content_events += brought
                    self._lessons = _LESSONS
            end = event_end(data, at)
            if end < 0:
                break
            if end - at > MAX_EVENT:
                return self._overflow(out, data[at:])
            out.append(self._read(data[at:end]))
            if self.error is not None:
                return b"".join(out)
            at = end
        if at < size:
            self._held += data[at:]
            if size - at > MAX_EVENT:
                return self._overflow(out, b"")
        return out[0] if len(out) == 1 else b"".join(out)

    def _overflow(self, out: list[bytes], rest: bytes) -> bytes:
        """Give up looking: everything from here on passes as it is, and nobody may wait for what we would have seen."""
        self.overflowed = self.saw_event = self.saw_content = True
        relayed = b"".join((*out, self._held, rest))
        self._end = relayed[-len(_LAST) :]
        self._held.clear()
        return relayed

    def _read(self, event: bytes) -> bytes:
        """What to relay of one whole event, having parsed it."""
        payload = Payload.of(event, b"data:")
        if payload is None:
            return self._read_error_line(event)
        self.saw_event = True
        if payload.value.strip() == b"[DONE]":
            self.done = True
            return event
        try:
            top = json.loads(payload.value.decode("utf-8", "replace"))
            return self._read_object(event, payload, top) if isinstance(top, dict) else event
        except (ValueError, RecursionError):
            return event

    def _read_error_line(self, event: bytes) -> bytes:
        """Older llama.cpp servers say `error: {…}` instead of `data: {"error": {…}}`."""
        payload = Payload.of(event, b"error:")
        if payload is None:
            return event
        self.saw_event = True
        text = payload.value.decode("utf-8", "replace")
        try:
            error = json.loads(text)
        except (ValueError, RecursionError):
            error = text
        self.error = error if isinstance(error, dict) else {"message": str(error)}
        return b""

    def _read_object(self, event: bytes, payload: Payload, top: dict[str, Any]) -> bytes:
        """Note what an event says, splice or drop what must be, learn its shape. Raises ValueError, RecursionError."""
        self.error = _engine_error(top)
        if self.error is not None:
            return b""
        usage, choices = top.get("usage"), top.get("choices")
        if isinstance(usage, dict):
            self.usage = _usage(usage) or self.usage
            if choices == [] and not self._keep_usage:
                return b""
        edits: list[Edit] = []
        if self._client_model is not None and isinstance(name := top.get("model"), str) and name != self._client_model:
            edits.append(self._rename(event, payload))
        if isinstance(choices, list):
            self._note_choices(choices)
            if self._lessons and not isinstance(usage, dict):
                self._learn(event, payload, choices, edits)
            edits += self._add_roles(payload, top)
        for start, end, new in sorted(edits, reverse=True):
            event = event[:start] + new + event[end:]
        return event

    def _rename(self, event: bytes, payload: Payload) -> Edit:
        """The edit that puts the client's name in the place of the engine's."""
        known = None if self._shape is None else self._shape.find_model(event)
        if known is not None:
            return (*known, self._name)
        model = payload.spans["model"]
        return payload.replacement(model.start, model.end, self._name)

    def _note_choices(self, choices: list[Any]) -> None:
        for choice in choices:
            self.finish_reason = _finish_reason(choice) or self.finish_reason
        if any(_has_content(choice) for choice in choices):
            self.saw_content = True
            self.content_events += 1

    def _add_roles(self, payload: Payload, top: dict[str, Any]) -> list[Edit]:
        """The edits that give a role to the first delta of each choice of a chat that has none."""
        edits: list[Edit] = []
        if top.get("object") != "chat.completion.chunk":
            return edits
        for place, choice in enumerate(top["choices"]):
            if not isinstance(choice, dict) or not isinstance(delta := choice.get("delta"), dict):
                continue
            index = choice.get("index", 0)
            if isinstance(index, int) and index not in self._roles:
                self._roles.add(index)
                if delta.get("role") is None:
                    edits.append(payload.role_edit(place))
        return edits

    def _learn(self, event: bytes, payload: Payload, choices: list[Any], edits: list[Edit]) -> None:
        """Remember the shape of an event that brings nothing but text, so that the next ones need no parsing."""
        if not brings_text(choices):
            return
        shape = learn_shape(event, payload, edits[0] if edits else None, self._client_model is not None)
        if shape is not None:
            self._shape = shape
            self._lessons -= 1


# --- reading -----------------------------------------------------------------------------------------------------------


def _engine_error(top: dict[str, Any]) -> dict[str, Any] | None:
    """The error that an event is, if it is one; a bare text becomes its message."""
    error = top.get("error")
    if error is None and top.get("object") == "error":
        error = top
    return error if error is None or isinstance(error, dict) else {"message": str(error)}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _usage(value: object) -> Usage | None:
    """A "usage" member read; None unless it has a prompt count."""
    if not isinstance(value, dict) or (prompt := _count(value.get("prompt_tokens"))) is None:
        return None
    details = value.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
    return Usage(prompt, _count(value.get("completion_tokens")) or 0, cached)


def _finish_reason(choice: object) -> str | None:
    reason = choice.get("finish_reason") if isinstance(choice, dict) else None
    return reason if isinstance(reason, str) and reason else None


def _has_content(choice: object) -> bool:
    """Whether a choice of a chunk brings something the model wrote."""
    if not isinstance(choice, dict):
        return False
    delta = choice.get("delta")
    return bool(choice.get("text")) or (isinstance(delta, dict) and any(delta.get(name) for name in _CONTENT_NAMES))
