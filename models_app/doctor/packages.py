"""Python and the packages of requirements.txt."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from django.conf import settings

from models_app.doctor.finding import Context, Finding, fail, ok, warn

MIN_PYTHON = (3, 11)
INSTALL = "Run: pip install -r requirements.txt."

_PIN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(\[[^\]]*\])?==(?P<version>[^\s;#]+)")


def check(context: Context) -> Iterable[Finding]:
    yield judge_python(sys.version_info[:3])
    file = Path(settings.BASE_DIR) / "requirements.txt"
    try:
        pins = parse_pins(file.read_text())
    except OSError as error:
        yield warn(f"{file} cannot be read ({error.strerror}), so versions of packages are not compared.", "Put it back.")
        return
    yield from judge_packages(pins, {name: installed(name) for name in pins})


def judge_python(version: tuple[int, ...]) -> Finding:
    shown = ".".join(map(str, version))
    if version < MIN_PYTHON:
        return fail(f"Python {shown} is too old.", f"Install Python {'.'.join(map(str, MIN_PYTHON))} or newer.")
    return ok(f"Python {shown}.")


def parse_pins(text: str) -> dict[str, str]:
    """{package: version} of every line that pins one."""
    found = (_PIN.match(line) for line in text.splitlines())
    return {match["name"]: match["version"] for match in found if match}


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def judge_packages(pins: Mapping[str, str], there: Mapping[str, str | None]) -> Iterator[Finding]:
    """One line for all that are as pinned, and one for each that is not."""
    right = 0
    for name, wanted in pins.items():
        version = there.get(name)
        if version is None:
            yield fail(f"The package {name} is missing.", INSTALL)
        elif version != wanted:
            yield warn(f"The package {name} is {version}; {wanted} is what Assistant is tested with.", INSTALL)
        else:
            right += 1
    if right:
        yield ok(f"{right} of {len(pins)} packages are as requirements.txt pins them.")
    elif not pins:
        yield warn("requirements.txt pins no package.", "Put back the file that came with Assistant.")
