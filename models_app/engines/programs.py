"""Finding an engine's program on this node and asking it about itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from models_app.engines.environment import engine_environment
from models_app.exceptions import MissingProgram, PreflightError

ANSWER_S = 15.0  # a cold disk may have to bring hundreds of megabytes of libraries
MOST = 1 << 20  # characters of an answer that are looked at


@dataclass(frozen=True, slots=True)
class Answer:
    """How a short run ended. code is negative where a signal ended it; text is what it printed, errors too."""

    code: int
    text: str

    @property
    def last_line(self) -> str:
        return next((line.strip() for line in reversed(self.text.splitlines()) if line.strip()), "it said nothing")


def find(name: str, setting: str, remedy: str) -> Path:
    """The program behind a setting: an absolute path, or a name looked up on PATH. PreflightError ends in the remedy."""
    found = shutil.which(name)
    if found is not None:
        return Path(found).absolute()
    where = f"{name} is no program that can be run" if "/" in name else f"The program {name} is not on PATH"
    raise MissingProgram(f"{where}; {remedy}, or name it in {setting}.")


def ask(argv: list[str], limit_s: float = ANSWER_S) -> Answer:
    """Run a program that answers at once, with an engine's environment. PreflightError where it cannot be run or hangs."""
    program = argv[0]
    try:
        done = subprocess.run(
            argv,
            env=engine_environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PreflightError(f"{program} did not answer “{argv[-1]}” within {limit_s:g} s; run it by hand to see why.") from None
    except OSError as error:
        raise MissingProgram(f"{program} cannot be run ({error.strerror}); check its permissions and architecture.") from error
    return Answer(done.returncode, done.stdout[:MOST].decode(errors="replace"))
