"""Kinds of values that an engine's allow-list of extra_args knows, and the check against such a list. Pure."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from models_app.exceptions import PreflightError

MOST_SHOWN = 80  # characters of a name or value that a message repeats


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
        # Compared as it is: an integer may be too large to become a float, and NaN lies between nothing.
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


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
    pattern: str = r"[^\x00\ud800-\udfff]*"
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


@dataclass(frozen=True, slots=True)
class Words:
    """Some of these words, in an order that matters, none twice."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        return "a list of some of " + ", ".join(self.words)

    def accepts(self, value: object) -> bool:
        if not isinstance(value, list) or not value or not all(isinstance(one, str) and one in self.words for one in value):
            return False
        return len(set(value)) == len(value)


@dataclass(frozen=True, slots=True)
class Table:
    """An object of plain values by name."""

    longest: int  # characters of its JSON

    def __str__(self) -> str:
        return f"an object of names and plain values of at most {self.longest} characters"

    def accepts(self, value: object) -> bool:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            return False
        plain = all(one is None or isinstance(one, str | int | float | bool) for one in value.values())
        return plain and len(json.dumps(value)) <= self.longest


@dataclass(frozen=True, slots=True)
class Cpus:
    """Numbers and ranges of processors, as taskset and Docker write them."""

    most: int

    def __str__(self) -> str:
        return f"numbers and ranges of processors below {self.most}, such as 0-3,8"

    def accepts(self, value: object) -> bool:
        if not isinstance(value, str) or not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", value):
            return False
        return bool(cpu_numbers(value)) and max(cpu_numbers(value)) < self.most


def cpu_numbers(text: str) -> list[int]:
    """The numbers a Cpus text names, in order; a range that runs backwards names none."""
    pairs = [part.partition("-") for part in text.split(",")]
    return sorted({number for low, _, high in pairs for number in range(int(low), int(high or low) + 1)})


@dataclass(frozen=True, slots=True)
class File:
    """A file of the node, where model files may be. Whoever makes the ModelSpec resolves it; engines see absolute paths."""

    def __str__(self) -> str:
        return "the path of a file in the folders for model files"

    def accepts(self, value: object) -> bool:
        return isinstance(value, str) and 0 < len(value) <= 4096 and "\0" not in value

    def resolved(self, value: Any, resolve: Callable[[str], Path]) -> Any:
        return str(resolve(value))


@dataclass(frozen=True, slots=True)
class Adapters:
    """LoRA adapters: a list of {"path": …, "scale": …}, the scale being 1 where it is left out."""

    most: int

    def __str__(self) -> str:
        return f'a list of 1 to {self.most} objects such as {{"path": "adapter.gguf", "scale": 1.0}}'

    def accepts(self, value: object) -> bool:
        return isinstance(value, list) and 0 < len(value) <= self.most and all(map(_is_adapter, value))

    def resolved(self, value: Any, resolve: Callable[[str], Path]) -> Any:
        return [{**one, "path": str(resolve(one["path"]))} for one in value]


def _is_adapter(value: object) -> bool:
    if not isinstance(value, dict) or not {"path"} <= value.keys() <= {"path", "scale"}:
        return False
    return File().accepts(value["path"]) and Number(-100.0, 100.0).accepts(value.get("scale", 1.0))


def resolved(options: Mapping[str, Option], values: Mapping[str, Any], resolve: Callable[[str], Path]) -> dict[str, Any]:
    """The settings with every path in them resolved; raises what `resolve` raises. What is unknown or wrong stays as it is,
    for check() to refuse."""
    found = dict(values)
    for name, value in values.items():
        option = options.get(name)
        if isinstance(option, File | Adapters) and option.accepts(value):
            found[name] = option.resolved(value, resolve)
    return found


def check(options: Mapping[str, Option], values: Mapping[str, Any]) -> None:
    """Raise PreflightError naming the first setting that is refused, unknown or out of range, and what is allowed."""
    for name, value in values.items():
        option = options.get(name)
        if option is None:
            raise PreflightError(f"extra_args: “{name[:MOST_SHOWN]}” is not an allowed setting; {_instead(name, options)}.")
        if not option.accepts(value):
            raise PreflightError(f"extra_args: “{name}” must be {option}, not {_shown(value)}.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def _instead(name: str, options: Mapping[str, Option]) -> str:
    """What may have been meant, else everything there is."""
    alike = [one for one in options if name and one.endswith(f".{name}")] or difflib.get_close_matches(name, options, 3, 0.7)
    return f"did you mean {' or '.join(alike)}" if alike else f"allowed are: {', '.join(options)}"
