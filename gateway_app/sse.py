"""Relaying an OpenAI-shaped event stream while looking at it from the side. Pure: no Django, no I/O.

Bytes are never written anew. What changes is spliced: the model's name where the client used another one, a role that the
engine left out of a choice's first delta. What is dropped is dropped whole: the usage event nobody asked for, the engine's
own error event (the caller answers with ours instead) and everything after it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from gateway_app.event_shape import MAX_EVENT, EventShape, learn_shape
from gateway_app.json_spans import Span, document, elements, members

_CONTENT_NAMES: Final = ("content", "reasoning_content", "tool_calls", "reasoning", "refusal", "function_call")
_LESSONS: Final = 4  # events whose shape is learnt before a learnt shape has proved useful

_Edit = tuple[int, int, bytes]  # start, end, what stands there instead


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request, as the engine counted them. cached_tokens: None where it does not say."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None


# --- whole answers -----------------------------------------------------------------------------------------------------


def splice_model(body: bytes, name: str) -> bytes:
    """A whole JSON answer with its top-level "model" replaced and every other byte kept; as it is if it has none."""
    try:
        top = document(body.decode("latin-1"))
    except (ValueError, RecursionError):
        return body
    spellings = _spellings(name)
    model = _misnamed(body, top, spellings)
    return body if model is None else body[: model.start] + spellings[0] + body[model.end :]


def read_usage(body: bytes) -> tuple[Usage | None, str | None]:
    """Usage and the first finish_reason of a whole JSON answer; None for what it does not say."""
    try:
        top = json.loads(body)
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(top, dict):
        return None, None
    choices = top.get("choices")
    reasons = [_finish_reason(choice) for choice in choices] if isinstance(choices, list) else []
    return _usage(top.get("usage")), next((reason for reason in reasons if reason), None)


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
        self._names = None if client_model is None else _spellings(client_model)
        self._keep_usage = keep_usage
        self._held = bytearray()  # the beginning of an event that has not ended; at most MAX_EVENT
        self._roles: set[int] = set()  # choices that have had a role
        self._shape: EventShape | None = None
        self._lessons = _LESSONS

    def feed(self, data: bytes) -> bytes:
        """What to relay now that these bytes have come; b"" while an event is incomplete."""
        if self.overflowed:
            return data
        if self.error is not None:
            return b""
        held = self._held
        if held:
            start = max(0, len(held) - 3)
            held += data
            if _event_end(held, start) < 0:
                return self._overflow([], b"") if len(held) > MAX_EVENT else b""
            data = bytes(held)
            held.clear()
        return self._relay(data)

    def finish(self) -> bytes:
        """What to relay when the upstream has ended properly: a last event that lacks its blank line."""
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
            end = _event_end(data, at)
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
        self._held.clear()
        return relayed

    def _read(self, event: bytes) -> bytes:
        """What to relay of one whole event, having parsed it."""
        found = _field(event, b"data:")
        if found is None:
            return self._read_error_line(event)
        payload, offsets = found
        self.saw_event = True
        if payload.strip() == b"[DONE]":
            self.done = True
            return event
        try:
            top = document(payload.decode("latin-1"))
        except (ValueError, RecursionError):
            return event
        self.error = _engine_error(payload, top)
        return b"" if self.error is not None else self._read_chunk(event, payload, top, offsets)

    def _read_error_line(self, event: bytes) -> bytes:
        """Older llama.cpp servers say `error: {…}` instead of `data: {"error": {…}}`."""
        found = _field(event, b"error:")
        if found is None:
            return event
        self.saw_event = True
        text = found[0].decode("utf-8", "replace")
        try:
            error = json.loads(text)
        except (ValueError, RecursionError):
            error = text
        self.error = error if isinstance(error, dict) else {"message": str(error)}
        return b""

    def _read_chunk(self, event: bytes, payload: bytes, top: dict[str, Span], offsets: list[tuple[int, int]]) -> bytes:
        """Note what an event says, splice what must change, learn its shape."""
        usage, counted = top.get("usage"), False
        if usage is not None and isinstance(usage.value, dict):
            counted = True
            self.usage = _usage(usage.value) or self.usage
        edits: list[_Edit] = []
        model = _misnamed(payload, top, self._names) if self._names else None
        rename = self._names[0] if self._names and model else None
        if model is not None and rename is not None:
            edits.append((model.start, model.end, rename))
        choices = top.get("choices")
        if choices is not None and isinstance(choices.value, list):
            if counted and not choices.value and not self._keep_usage:
                return b""
            text = payload.decode("latin-1")
            roles = self._add_roles(text, top, choices)
            self._note_choices(choices.value)
            if self._lessons and not counted and not roles and len(offsets) == 1:
                self._learn(event, text, top, offsets[0][1], rename)
            edits += roles
        return _splice(event, edits, offsets) if edits else event

    def _note_choices(self, choices: list[Any]) -> None:
        for choice in choices:
            self.finish_reason = _finish_reason(choice) or self.finish_reason
        if any(_has_content(choice) for choice in choices):
            self.saw_content = True
            self.content_events += 1

    def _add_roles(self, text: str, top: dict[str, Span], choices: Span) -> list[_Edit]:
        """The edits that give a role to the first delta of each choice of a chat that has none."""
        edits: list[_Edit] = []
        if (kind := top.get("object")) is None or kind.value != "chat.completion.chunk":
            return edits
        for place, choice in enumerate(choices.value):
            if not isinstance(choice, dict) or not isinstance(delta := choice.get("delta"), dict):
                continue
            index = choice.get("index", 0)
            if isinstance(index, int) and index not in self._roles:
                self._roles.add(index)
                if delta.get("role") is None:
                    edits.append(_role_edit(text, elements(text, choices.start)[place]))
        return edits

    def _learn(self, event: bytes, text: str, top: dict[str, Span], offset: int, rename: bytes | None) -> None:
        shape = learn_shape(event, text, top, offset, rename, self._names is not None)
        if shape is not None:
            self._shape = shape
            self._lessons -= 1


# --- reading -----------------------------------------------------------------------------------------------------------


def _event_end(data: bytes | bytearray, at: int) -> int:
    """Where the event that begins here ends, its blank line included; -1 if it does not yet. Lines end with LF or CRLF."""
    newline = data.find(b"\n", at)
    while newline >= 0:
        if data.startswith(b"\n", newline + 1):
            return newline + 2
        if data.startswith(b"\r\n", newline + 1):
            return newline + 3
        newline = data.find(b"\n", newline + 1)
    return -1


def _field(event: bytes, name: bytes) -> tuple[bytes, list[tuple[int, int]]] | None:
    """The values of all lines of this field, joined by newlines, and (offset in that, offset in the event) of each line."""
    values: list[bytes] = []
    offsets: list[tuple[int, int]] = []
    size = at = 0
    for line in event.split(b"\n"):
        if line.startswith(name):
            begin = len(name) + line.startswith(b" ", len(name))
            value = line[begin:-1] if line.endswith(b"\r") else line[begin:]
            offsets.append((size, at + begin))
            values.append(value)
            size += len(value) + 1
        at += len(line) + 1
    return (b"\n".join(values), offsets) if values else None


def _splice(event: bytes, edits: list[_Edit], offsets: list[tuple[int, int]]) -> bytes:
    """The event with these edits, which speak of its data; no edit spans two lines, since a JSON text has no newline in it."""
    for start, end, new in sorted(edits, reverse=True):
        line_in_data, line_in_event = max(offset for offset in offsets if offset[0] <= start)
        shift = line_in_event - line_in_data
        event = event[: start + shift] + new + event[end + shift :]
    return event


def _spellings(name: str) -> tuple[bytes, bytes]:
    """The name as JSON: in ASCII, which is ours, and the other common way."""
    return json.dumps(name).encode("ascii"), json.dumps(name, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _misnamed(payload: bytes, top: dict[str, Span], spellings: tuple[bytes, bytes]) -> Span | None:
    """The first top-level "model", where it is a text and not one of these spellings already."""
    model = top.get("model")
    if model is None or not isinstance(model.value, str) or payload[model.start : model.end] in spellings:
        return None
    return model


def _role_edit(text: str, choice: Span) -> _Edit:
    """The edit that says the role in this choice's delta, which has none or null."""
    delta = members(text, choice.start)["delta"]
    role = members(text, delta.start).get("role")
    if role is not None:
        return role.start, role.end, b'"assistant"'
    return delta.start + 1, delta.start + 1, b'"role":"assistant",' if delta.value else b'"role":"assistant"'


def _engine_error(payload: bytes, top: dict[str, Span]) -> dict[str, Any] | None:
    """The error that an event is, if it is one; a bare text becomes its message."""
    kind = top.get("object")
    if (top["error"].value if "error" in top else None) is None and (kind is None or kind.value != "error"):
        return None
    whole: dict[str, Any] = json.loads(payload.decode("utf-8", "replace"))
    error = whole if whole.get("error") is None else whole["error"]
    return error if isinstance(error, dict) else {"message": str(error)}


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
