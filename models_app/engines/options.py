"""Kinds of values that an engine's allow-list of extra_args knows, and the check against such a list. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from models_app.exceptions import PreflightError


class Option(Protocol):
    """What one setting accepts; str() completes the sentence “must be …”."""

    def __str__(self) -> str: ...

    def accepts(self, value: object) -> bool:
        """Whether the value, as it stands in JSON, is of the right kind and size."""


@dataclass(frozen=True, slots=True)
class Whole:
    low: int
    high: int

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def accepts(self, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Number:
    low: float
    high: float

    def __str__(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"

    def accepts(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return math.isfinite(value) and self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Switch:
    def __str__(self) -> str:
        return "true or false"

    def accepts(self, value: object) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class Word:
    """One of these words."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        return "one of " + ", ".join(self.words)

    def accepts(self, value: object) -> bool:
        return isinstance(value, str) and value in self.words


@dataclass(frozen=True, slots=True)
class Text:
    """A text that does not begin with a dash, so that no program takes it for a flag; `pattern` must match all of it."""

    longest: int
    pattern: str = r"[^\x00]*"
    means: str = "a text"

    def __str__(self) -> str:
        return f"{self.means} of 1 to {self.longest} characters that does not begin with a dash"

    def accepts(self, value: object) -> bool:
        if not isinstance(value, str) or not 0 < len(value) <= self.longest or value.startswith("-"):
            return False
        return re.fullmatch(self.pattern, value, re.DOTALL) is not None


@dataclass(frozen=True, slots=True)
class Shares:
    """How a whole is divided: a list of numbers that are not negative and not all zero."""

    most: int

    def __str__(self) -> str:
        return f"a list of 1 to {self.most} numbers that are not negative and not all zero"

    def accepts(self, value: object) -> bool:
        if not isinstance(value, list) or not 0 < len(value) <= self.most:
            return False
        return all(Number(0.0, 1e6).accepts(part) for part in value) and sum(value) > 0


def check(options: Mapping[str, Option], values: Mapping[str, Any]) -> None:
    """Raise PreflightError naming the first setting that is refused, unknown or out of range, and what is allowed."""
    for name, value in values.items():
        option = options.get(name)
        if option is None:
            raise PreflightError(f"extra_args: “{name}” is not an allowed setting; allowed are: {', '.join(options)}.")
        if not option.accepts(value):
            raise PreflightError(f"extra_args: “{name}” must be {option}, not {value!r}.")
