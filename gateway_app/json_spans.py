"""Where things stand in a JSON text, so that bytes can be replaced without writing the rest anew. Pure: no Django, no I/O.

Texts are read as Latin-1: JSON's structure is ASCII, and one character per byte makes every position a byte offset. String
values come out as Latin-1 too; compare them only with ASCII, or read them again as UTF-8 from their span.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

_decode = json.JSONDecoder().raw_decode
_blank = re.compile(r"[ \t\r\n]*").match
_plain_name = re.compile(r'"([^"\\\x00-\x1f]*)"[ \t\r\n]*:[ \t\r\n]*').match
_colon = re.compile(r"[ \t\r\n]*:[ \t\r\n]*").match
_comma = re.compile(r"[ \t\r\n]*,[ \t\r\n]*").match


class Span(NamedTuple):
    """A value and where its text begins and ends."""

    value: Any
    start: int
    end: int


def _skip(text: str, at: int) -> int:
    """Past blanks."""
    found = _blank(text, at)
    return found.end() if found else at


def _end(text: str, at: int, bracket: str) -> int:
    """Past the closing bracket, which must come next."""
    at = _skip(text, at)
    if not text.startswith(bracket, at):
        raise ValueError(f"expected {bracket} at {at}")
    return at + 1


def _name(text: str, at: int) -> tuple[str, int]:
    """A member's name and where its value begins."""
    if plain := _plain_name(text, at):
        return plain.group(1), plain.end()
    name, at = _decode(text, at)
    colon = _colon(text, at)
    if not isinstance(name, str) or colon is None:
        raise ValueError(f"no member before {at}")
    return name, colon.end()


def _object(text: str, at: int) -> tuple[dict[str, Span], int]:
    """The members and the position after the closing brace."""
    found: dict[str, Span] = {}
    if not text.startswith("{", at):
        raise ValueError(f"no object at {at}")
    at = _skip(text, at + 1)
    if text.startswith("}", at):
        return found, at + 1
    while True:
        name, start = _name(text, at)
        value, at = _decode(text, start)
        found.setdefault(name, Span(value, start, at))
        comma = _comma(text, at)
        if comma is None:
            return found, _end(text, at, "}")
        at = comma.end()


def members(text: str, at: int) -> dict[str, Span]:
    """The members of the object that begins here; of a repeated name the first. Raises ValueError, RecursionError."""
    return _object(text, at)[0]


def elements(text: str, at: int) -> list[Span]:
    """The elements of the array that begins here. Raises ValueError, RecursionError."""
    found: list[Span] = []
    if not text.startswith("[", at):
        raise ValueError(f"no array at {at}")
    at = _skip(text, at + 1)
    if text.startswith("]", at):
        return found
    while True:
        value, end = _decode(text, at)
        found.append(Span(value, at, end))
        comma = _comma(text, end)
        if comma is None:
            _end(text, end, "]")
            return found
        at = comma.end()


def document(text: str) -> dict[str, Span]:
    """The members of a text that is one object and nothing else. Raises ValueError, RecursionError."""
    found, end = _object(text, _skip(text, 0))
    if _skip(text, end) != len(text):
        raise ValueError("text after the object")
    return found
