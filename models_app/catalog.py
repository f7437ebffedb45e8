"""Models that can be fetched by name: the catalogue that comes with Assistant, or another TOML file of the same shape."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from models_app.downloads import check_file_name, parse_source
from models_app.exceptions import CatalogError, DownloadError

BUILT_IN = Path(__file__).with_name("catalog.toml")
DEMO = "smollm2-135m-instruct"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One model: where it comes from, how to know it is right, and what it needs. The fields are catalog.toml's keys."""

    name: str
    title: str
    source: str
    file: str
    sha256: str
    bytes: int
    licence: str
    ctx: int  # tokens
    memory: int  # bytes


_KEYS: dict[str, type] = {key: kind for key, kind in get_type_hints(Entry).items() if key != "name"}


def load(file: Path = BUILT_IN) -> dict[str, Entry]:
    """Every entry by name, in the file's order. CatalogError names file, entry and key."""
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CatalogError(f"{file} cannot be read as a catalogue: {error}.") from error
    return {name: _parsed(file, name, table) for name, table in tables.items()}


def entry(name: str, file: Path = BUILT_IN) -> Entry:
    """The entry of that name; CatalogError lists the names there are."""
    entries = load(file)
    if name not in entries:
        raise CatalogError(f"No model {name!r} in the catalogue; it has: {', '.join(entries)}.")
    return entries[name]


def _parsed(file: Path, name: str, table: Any) -> Entry:
    where = f"{file}: [{name}]"
    if not isinstance(table, dict):
        raise CatalogError(f"{where} is a value outside of any entry; an entry is a table of the keys {', '.join(_KEYS)}.")
    if not _NAME.fullmatch(name):
        raise CatalogError(f"{where}: use letters, digits and . _ - in a name and start it with a letter or digit.")
    if unknown := sorted(table.keys() - _KEYS.keys()):
        raise CatalogError(f"{where} {unknown[0]}: no such key; an entry has {', '.join(_KEYS)}.")
    for key, kind in _KEYS.items():
        if complaint := _complaint(key, table.get(key), kind):
            raise CatalogError(f"{where} {key}: {complaint}.")
    return Entry(name=name, **table)


def _complaint(key: str, value: object, kind: type) -> str:
    """What is wrong with the value of a key; empty where nothing is."""
    if value is None:
        return "is missing"
    if type(value) is not kind:  # a TOML boolean would pass for an int
        return f"{value!r} must be {'a whole number' if kind is int else 'text'}"
    if isinstance(value, int):
        return "" if value > 0 else f"{value} must be greater than 0"
    text = str(value)
    if key == "sha256":
        return "" if _SHA256.fullmatch(text) else f"{text!r} must be 64 lower-case hexadecimal digits"
    try:
        {"source": parse_source, "file": check_file_name}.get(key, _check_text)(text)
    except DownloadError as error:
        return str(error).rstrip(".")
    return ""


def _check_text(text: str) -> None:
    if not text.strip():
        raise DownloadError("it must not be empty")
