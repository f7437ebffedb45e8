"""Recognising stream events without parsing them: all but the content of one that was parsed. Pure: no Django, no I/O.

An engine's events differ in the text they bring and, at most, in some digits behind it. So one event is parsed and cut into

    prefix                                      content   middle                            tail
    data: {"id":…,"choices":[{"delta":{"content":"   hello   "},"finish_reason":null}]          ,"created":1,"model":"m"}␊␊

and a later one with the same prefix and middle around any JSON string, and the same tail but for digits, says the same in
every respect but the text: model, choice, role, no usage, no error, not finished. Comparing costs a fraction of a parse, and
whatever differs is parsed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from gateway_app.event_payload import Edit, Payload
from gateway_app.json_spans import Span, elements, members

MAX_EVENT: Final = 2**20  # bytes of one event that are looked at

_BACKSLASH: Final = 0x5C
_ZEROED: Final = bytes(0x30 if 0x31 <= byte <= 0x39 else byte for byte in range(256))  # every digit becomes 0
_string_rest = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL).match


@dataclass(frozen=True, slots=True)
class EventShape:
    """A shape, and what is relayed in its place where the model is renamed.

    prefix ends with the quote before the content, middle begins with the quote after it and ends with the "choices" array.
    zeroed: the tail with its digits made 0; empty where the tail must fit exactly.
    name: what replaces the model. head: where in the prefix the model stands that is replaced, with prefix_out the prefix
    renamed; cut: where in the tail. At most one of head and cut is given.
    """

    prefix: bytes
    middle: bytes
    tail: bytes
    zeroed: bytes
    name: bytes
    head: tuple[int, int] | None
    prefix_out: bytes
    cut: tuple[int, int] | None

    def relay(self, data: bytes, at: int, out: list[bytes]) -> tuple[int, int]:
        """Append what to relay of the events from here on that fit; where they end, and how many of them brought text."""
        prefix, middle, tail = self.prefix, self.middle, self.tail
        start, brought = at, 0
        while data.startswith(prefix, at):
            content = at + len(prefix)
            quote = data.find(b'"', content)
            if quote > content and data[quote - 1] == _BACKSLASH:
                rest = _string_rest(data, content)
                quote = rest.end() - 1 if rest else -1
            if quote < 0 or not data.startswith(middle, quote) or data.find(b"\n", content, quote) >= 0:
                break
            after = quote + len(middle)
            end = after + len(tail)
            if end - at > MAX_EVENT or not (data.startswith(tail, after) or data[after:end].translate(_ZEROED) == self.zeroed):
                break
            brought += quote > content
            if self.cut is not None:
                out += (data[at : after + self.cut[0]], self.name, data[after + self.cut[1] : end])
            elif self.head is not None:
                out += (self.prefix_out, data[content:end])
            at = end
        if at > start and self.cut is None and self.head is None:
            out.append(data[start:at])
        return at, brought

    def find_model(self, event: bytes) -> tuple[int, int] | None:
        """Where the model to replace stands in an event that is like this one up to there, or from the choices on."""
        if self.head is not None and event.startswith(self.prefix[: self.head[1]]):
            return self.head
        if self.cut is not None and event.endswith(self.tail):
            stop = len(event) - len(self.tail)
            return stop + self.cut[0], stop + self.cut[1]
        return None


def brings_text(choices: list[Any]) -> bool:
    """Whether an event has one choice that is not finished: a cheap look before learn_shape's thorough one."""
    return len(choices) == 1 and isinstance(choices[0], dict) and choices[0].get("finish_reason") is None


def _only_text(text: str, choices: Span) -> Span | None:
    """The text that the first choice brings, if it brings one: in its delta, or as "text"."""
    choice = members(text, elements(text, choices.start)[0].start)
    delta = choice.get("delta")
    if delta is None or not isinstance(delta.value, dict):
        found = [choice["text"]] if "text" in choice else []
    else:
        inner = members(text, delta.start)
        found = [inner[name] for name in ("content", "reasoning_content") if name in inner]
        if "tool_calls" in inner:
            found += _arguments(text, inner["tool_calls"])
    texts = [span for span in found if isinstance(span.value, str) and span.value]
    return texts[0] if len(texts) == 1 else None


def _arguments(text: str, calls: Span) -> list[Span]:
    """The arguments of the calls in a delta; a call streams as many pieces of them."""
    found = []
    for call in elements(text, calls.start) if isinstance(calls.value, list) else []:
        if isinstance(call.value, dict) and isinstance(call.value.get("function"), dict):
            function = members(text, members(text, call.start)["function"].start)
            found += [function["arguments"]] if "arguments" in function else []
    return found


def learn_shape(event: bytes, payload: Payload, rename: Edit | None, keep_name: bool) -> EventShape | None:
    """The shape of an event with brings_text() choices and neither usage nor error.

    None if it does not bring just one text. rename: the edit of its model, None to leave it. keep_name: the model is left
    because it is the right one, so it must stay so.
    """
    content = _only_text(payload.text, payload.spans["choices"])
    if content is None:
        return None
    begin, end = payload.place(content.start) + 1, payload.place(content.end) - 1
    stop = payload.place(payload.spans["choices"].end)
    prefix, middle, tail = event[:begin], event[end:stop], event[stop:]
    zeroed = tail.translate(_ZEROED)
    if rename is None:
        if keep_name and "model" in payload.spans and payload.place(payload.spans["model"].start) > begin:
            zeroed = b""
        return EventShape(prefix, middle, tail, zeroed, b"", None, prefix, None)
    first, last, name = rename
    if first < begin:
        return EventShape(prefix, middle, tail, zeroed, name, (first, last), prefix[:first] + name + prefix[last:], None)
    return EventShape(prefix, middle, tail, zeroed, name, None, prefix, (first - stop, last - stop))
