"""A llama-server on this node: where it is, whether it starts, which version it is and which flags it knows.

Releases come several times a day and builds of packagers carry no usable number, so what a binary can do is read from its
--help, never concluded from its version.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from models_app.engines import programs
from models_app.engines.programs import Answer
from models_app.exceptions import MissingLibrary, MissingProgram, PreflightError

SETTING = "ASSISTANT_LLAMA_SERVER"
INSTALL = "install llama.cpp (its program llama-server)"

# “version: 4567 (abc1234)”, or “version: 0.1.0-dev (build 4567, commit abc1234)”. A shallow clone counts as build 1.
_BUILD = re.compile(r"^version: (?:(\d+) \(|.*\(build (\d+), )", re.MULTILINE)
_VERSION = re.compile(r"^version: (.+)$", re.MULTILINE)
# A flag stands at the beginning of a line of --help, its other spellings behind commas, then its value and description.
_FLAGS = re.compile(r"^--?[A-Za-z][\w.-]*(?:, +--?[A-Za-z][\w.-]*)*", re.MULTILINE)
_LIBRARY = re.compile(r"error while loading shared libraries: ([^:\s]+)")
_SYMBOL = re.compile(r"version [`'‘]([^'’]+)['’] not found")


@dataclass(frozen=True, slots=True)
class Binary:
    """build: the release's number, None where the builder left none. flags: every spelling it knows."""

    path: Path
    version: str
    build: int | None
    flags: frozenset[str]

    def spelling(self, *names: str) -> str | None:
        """The first of these flags that it knows."""
        return next((name for name in names if name in self.flags), None)


def inspect(name: str) -> Binary:
    """The binary behind the setting. PreflightError says why there is none that runs. Kept until the file changes."""
    path = programs.find(name, SETTING, INSTALL)
    stat = path.stat()
    return _inspect(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def _inspect(path: Path, _size: int, _changed_ns: int) -> Binary:
    told = _ask(path, "--version")
    version = _VERSION.search(told)
    if version is None:
        raise MissingProgram(f"{path} is not llama.cpp's server (it does not tell its version); {INSTALL}, or set {SETTING}.")
    return Binary(path, version[1].strip(), _build_of(told), flags_in(_ask(path, "--help")))


def _build_of(told: str) -> int | None:
    match = _BUILD.search(told)
    number = int(match[1] or match[2]) if match else 0
    return number if number > 1 else None


def flags_in(text: str) -> frozenset[str]:
    """Every spelling of every flag in the text of --help."""
    return frozenset(flag.strip() for line in _FLAGS.findall(text) for flag in line.split(","))


def _ask(path: Path, flag: str) -> str:
    answer = programs.ask([str(path), flag])
    if answer.code != 0:
        raise _why_not(path, answer)
    return answer.text


def _why_not(path: Path, answer: Answer) -> PreflightError:
    """What to raise for a binary that does not start, from what the loader or the kernel said."""
    if library := _LIBRARY.search(answer.text):
        return MissingLibrary(
            f"{path} cannot start: the library {library[1]} is missing; install it, or add its folder to LD_LIBRARY_PATH."
        )
    if symbol := _SYMBOL.search(answer.text):
        return MissingLibrary(f"{path} was built for a newer system ({symbol[1]} is missing here); install a build for this one.")
    if answer.code == -signal.SIGILL:
        return MissingProgram(
            f"{path} was built for another kind of processor (illegal instruction); install a build for this one."
        )
    return MissingProgram(f"{path} cannot start (exit code {answer.code}): {answer.last_line.rstrip('.')}; install it again.")
