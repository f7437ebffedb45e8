"""One server-sent event: where it ends, what its fields say, and where in its bytes that stands. Pure: no Django, no I/O."""

from __future__ import annotations

from functools import cached_property

from gateway_app.json_spans import Span, document, elements, members

Edit = tuple[int, int, bytes]  # start and end in the event, what shall stand there


def event_end(data: bytes | bytearray, at: int) -> int:
    """Where the event that begins here ends, its blank line included; -1 if it does not yet. Lines end with LF or CRLF."""
    newline = data.find(b"\n", at)
    while newline >= 0:
        if data.startswith(b"\n", newline + 1):
            return newline + 2
        if data.startswith(b"\r\n", newline + 1):
            return newline + 3
        newline = data.find(b"\n", newline + 1)
    return -1


class Payload:
    """The value of a field: its lines joined by newlines. offsets: (in the value, in the event) where each line begins."""

    def __init__(self, value: bytes, offsets: list[tuple[int, int]]) -> None:
        self.value = value
        self.offsets = offsets

    @classmethod
    def of(cls, event: bytes, field: bytes) -> Payload | None:
        """The field of this name, given with its colon; None if the event has none."""
        values: list[bytes] = []
        offsets: list[tuple[int, int]] = []
        size = at = 0
        for line in event.split(b"\n"):
            if line.startswith(field):
                begin = len(field) + line.startswith(b" ", len(field))
                value = line[begin:-1] if line.endswith(b"\r") else line[begin:]
                offsets.append((size, at + begin))
                values.append(value)
                size += len(value) + 1
            at += len(line) + 1
        return cls(b"\n".join(values), offsets) if values else None

    @cached_property
    def text(self) -> str:
        """The value with one character per byte."""
        return self.value.decode("latin-1")

    @cached_property
    def spans(self) -> dict[str, Span]:
        """The members of the object that the value is. Raises ValueError, RecursionError."""
        return document(self.text)

    def place(self, at: int) -> int:
        """The position in the event of a position in the value."""
        in_value, in_event = max(offset for offset in self.offsets if offset[0] <= at)
        return at - in_value + in_event

    def replacement(self, start: int, end: int, new: bytes) -> Edit:
        """The edit that replaces part of the value, which lies on one line: no token of a JSON text holds a newline."""
        first = self.place(start)
        return first, first + end - start, new

    def role_edit(self, place: int) -> Edit:
        """The edit that says the assistant's role in the delta of this choice, which has no role, or null."""
        choice = elements(self.text, self.spans["choices"].start)[place]
        delta = members(self.text, choice.start)["delta"]
        role = members(self.text, delta.start).get("role")
        if role is not None:
            return self.replacement(role.start, role.end, b'"assistant"')
        new = b'"role":"assistant",' if delta.value else b'"role":"assistant"'
        return self.replacement(delta.start + 1, delta.start + 1, new)
