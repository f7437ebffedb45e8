"""What a check finds, and how that is told."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field


class Level(enum.StrEnum):
    """ok; warn: it works, but look at it; fail: something does not work, or is not safe."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """text: one sentence on what was found. remedy: one on what to do, empty where nothing is."""

    level: Level
    text: str
    remedy: str = ""
    check: str = ""


def ok(text: str) -> Finding:
    return Finding(Level.OK, text)


def warn(text: str, remedy: str = "") -> Finding:
    return Finding(Level.WARN, text, remedy)


def fail(text: str, remedy: str = "") -> Finding:
    return Finding(Level.FAIL, text, remedy)


@dataclass(slots=True)
class Context:
    """What every check is told. fast: leave out what takes long. running: whether `up` runs on this home.

    missing: what other checks need and an earlier one found not to answer, by name, as the end of a sentence.
    """

    fast: bool = False
    public_url: str = ""
    running: bool = False
    missing: dict[str, str] = field(default_factory=dict)

    def absent(self, text: str, remedy: str) -> Finding:
        """Something that must be there while the platform runs, and cannot while it does not."""
        return fail(text, remedy) if self.running else warn(text, "Assistant is not running here: start it with manage.py up.")


@dataclass(frozen=True, slots=True)
class Check:
    """One family. needs: names in Context.missing without which it is not even tried. slow: left out by --fast."""

    name: str
    run: Callable[[Context], Iterable[Finding]]
    needs: tuple[str, ...] = ()
    slow: bool = False


COLOURS = {Level.OK: "32", Level.WARN: "33", Level.FAIL: "31"}


def exit_code(findings: Iterable[Finding]) -> int:
    return int(any(finding.level == Level.FAIL for finding in findings))


def as_text(findings: Sequence[Finding], colour: bool) -> str:
    """One line per finding and one on how many of each there are."""
    width = max((len(finding.check) for finding in findings), default=0)
    lines = [f"{_painted(one.level, colour)}  {one.check:<{width}}  {one.text} {one.remedy}".rstrip() for one in findings]
    counts = {level: sum(finding.level == level for finding in findings) for level in Level}
    summary = f"{counts[Level.FAIL]} failed, {counts[Level.WARN]} to look at, {counts[Level.OK]} fine."
    return "\n".join([*lines, "", summary])


def _painted(level: Level, colour: bool) -> str:
    word = f"{level.value:<4}"
    return f"\033[{COLOURS[level]}m{word}\033[0m" if colour else word


def as_json(findings: Sequence[Finding]) -> str:
    """{"status": the worst level, "findings": [{"check", "level", "text", "remedy"}, …]}"""
    worst = max((list(Level).index(finding.level) for finding in findings), default=0)
    return json.dumps({"status": list(Level)[worst].value, "findings": [asdict(one) for one in findings]}, indent=2)
