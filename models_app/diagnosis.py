"""Why an engine ended or could not start, and what to do about it. Pure: exit records and log lines in, sentences out."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace

from models_app.contracts.diagnoses import Code
from models_app.diagnosis_rules import OUT_OF_MEMORY, RULES, TITLES, find
from models_app.shim import ExitRecord

SAID_CHARS = 300
SHELL_CODES = range(129, 160)  # a wrapper script hands on the signal of its child as 128 + its number


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What happened and what to do, one sentence each."""

    code: Code
    what: str
    remedy: str

    @property
    def sentence(self) -> str:
        return f"{self.what} {self.remedy}".strip()


@dataclass(frozen=True, slots=True)
class Case:
    """What is known of the process beside its own words."""

    engine: str = ""
    port: int | None = None
    model_path: str = ""
    rebooted: bool = False  # the machine has been started anew since


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended, or why none could be started. reason says what happened and what to do."""

    reason: str
    log: str = ""
    code: int | None = None
    signal: int | None = None
    peak_memory_bytes: int | None = None
    diagnosis: str = ""
    remedy: str = ""


def title(code: str) -> str:
    """The diagnosis in a few words, for people."""
    return TITLES[Code(code)] if code in TITLES else code.replace("_", " ").capitalize()


def of_record(record: ExitRecord, case: Case) -> Exit:
    """An engine that ended although nobody of ours wanted it to."""
    found = classify(record, case)
    return replace(_explained(found, record["lines"], record), code=record["code"], signal=record["signal"])


def _explained(found: Diagnosis, lines: Sequence[str], record: ExitRecord | None = None) -> Exit:
    """The diagnosis with its evidence, without code and signal: where we ended it ourselves, those tell nothing."""
    return Exit(
        reason=found.sentence,
        log="\n".join(record["lines"] if record else lines),
        peak_memory_bytes=record["peak_memory_bytes"] if record else None,
        diagnosis=found.code,
        remedy=found.remedy,
    )


def without_record(lines: Sequence[str], case: Case) -> Exit:
    """The shim could not write a record: it was killed itself, or the machine was restarted."""
    if case.rebooted:
        found = Diagnosis(
            Code.NODE_RESTARTED, "The machine was restarted, and the engine ended with it.", "It is started again by itself."
        )
    else:
        found = Diagnosis(
            Code.KILLED,
            "The engine ended together with its shim, which somebody killed.",
            "Look for what kills processes of this user: the kernel's memory killer, a service manager, another administrator.",
        )
    return _explained(found, lines)


def not_ready(lines: Sequence[str], record: ExitRecord | None) -> Exit:
    """It did not answer within its load deadline and was ended."""
    evidence = record["lines"] if record else lines
    said = _last_words(evidence) or "nothing"
    return _explained(
        Diagnosis(
            Code.START_TIMEOUT,
            f"The engine was not ready in time; its log last said: {_quoted(said)}.",
            "See its log for what it waits for; a slow disk or too little memory make a load long.",
        ),
        lines,
        record,
    )


def wrong_server(port: int, holder: str, lines: Sequence[str], record: ExitRecord | None) -> Exit:
    """Somebody answers on the engine's port who is not the engine."""
    return _explained(
        Diagnosis(
            Code.WRONG_SERVER,
            f"Another program answers on port {port} ({holder}).",
            "Stop that program, or give the model another port or none.",
        ),
        lines,
        record,
    )


def wedged(complaint: str, lines: Sequence[str], record: ExitRecord | None) -> Exit:
    """It lives but does not serve, and was ended."""
    return _explained(
        Diagnosis(
            Code.WEDGED,
            f"The engine lived but {complaint}, so it was ended.",
            "If this repeats, see its log and update the engine.",
        ),
        lines,
        record,
    )


def not_started(what: str) -> Exit:
    """No process came to be although nothing spoke against it; what is a sentence."""
    return _explained(
        Diagnosis(Code.NOT_STARTED, what, "If this repeats, see the worker's log and look for want of memory or processes."), []
    )


def classify(record: ExitRecord, case: Case) -> Diagnosis:
    """The cause of an exit, from its signal or code and from what the engine said."""
    code, number = record["code"], record["signal"]
    if code is not None and code in SHELL_CODES:
        number = code - 128
    if record["asked"]:
        return Diagnosis(
            Code.STOPPED,
            "The engine's shim was told from outside to end it.",
            "Stop engines in the admin or the API, not by signals; it is started again if its model wants it.",
        )
    if number == signal.SIGKILL:
        return _killed(record)
    # A crash while serving is no matter of what was said at the start; want of memory may show as any signal.
    rules = OUT_OF_MEMORY if number is not None and number != signal.SIGABRT else RULES
    found = find(
        rules,
        "\n".join(_weighty(record["lines"])),
        port=case.port,
        path=case.model_path,
        peak_memory_bytes=record["peak_memory_bytes"],
    )
    if found is not None:
        return Diagnosis(found.code, found.what, found.remedy)
    return _by_signal(number, record, case) if number is not None else _by_code(record)


def _killed(record: ExitRecord) -> Diagnosis:
    if record["oom_kills"]:
        used = f" when it used {record['peak_memory_bytes'] / (1 << 20):,.0f} MiB" if record["peak_memory_bytes"] else ""
        return Diagnosis(
            Code.OUT_OF_MEMORY,
            f"The engine was killed by the kernel for want of memory{used}.",
            "Lower ctx_size or slots, use a smaller model, or free memory on this node.",
        )
    return Diagnosis(
        Code.KILLED,
        "The engine was killed (SIGKILL) by somebody outside this platform.",
        "Look for who does that: a memory guard such as systemd-oomd, a container limit, another administrator.",
    )


_CRASH_REMEDIES = {
    signal.SIGILL: "This processor lacks an instruction the engine was built for; install a build for this processor.",
    signal.SIGBUS: "Check the disk and the model file: it was shortened or became unreadable while it was in use.",
    signal.SIGABRT: "See its last lines for the failed check, and update the engine.",
    signal.SIGSEGV: "Lower ctx_size, check the model file, and update the engine.",
    signal.SIGFPE: "Check the model file, and update the engine.",
}


def _by_signal(number: int, record: ExitRecord, case: Case) -> Diagnosis:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number not in _CRASH_REMEDIES:
        return Diagnosis(
            Code.KILLED,
            f"The engine was ended by {name} from outside this platform.",
            "Look for who sends it: a service manager, a session that ended, another administrator.",
        )
    remedy = _CRASH_REMEDIES[signal.Signals(number)]
    if case.engine == "wasmedge" and number == signal.SIGSEGV:
        remedy = "WasmEdge ends like this when the context does not fit into memory: lower ctx_size or use a smaller model."
    # Ordinary last lines belong to the work it did well and would only mislead.
    return Diagnosis(Code.CRASHED, f"The engine crashed ({name}){_after(_complaint(record['lines']))}", remedy)


def _by_code(record: ExitRecord) -> Diagnosis:
    said = _last_words(record["lines"])
    what = f"The engine ended with exit code {record['code'] or 0}{_after(said) if said else ' without a word.'}"
    return Diagnosis(Code.UNKNOWN, what, "See its log for what came before.")


def _after(said: str) -> str:
    return f"; it last said: {_quoted(said)}." if said else "."


def _quoted(said: str) -> str:
    return f"“{said if len(said) <= SAID_CHARS else said[: SAID_CHARS - 1] + '…'}”"


# llama.cpp's log lines: time since the start, level, component, function, text.
_LEVELLED = re.compile(r"^[\d.]+ (?P<level>[EWID]) (?:\w+\s+)?(?:\S+: )?(?P<text>.+)$")


def _weighty(lines: Sequence[str]) -> list[str]:
    """Without what an engine itself calls a warning or less: it went on after that."""
    return [line for line in lines if not ((found := _LEVELLED.match(line)) and found["level"] != "E")]


_WASMEDGE_STAMP = re.compile(r"^\[[\d :.-]+\] \[error\] ")
_SAYS_NOTHING = re.compile(
    r"^note: run with|^\s*(?:At AST node|In instruction|When executing|File name|Bytecode offset)|Invalid API Key$"
)


def _last_words(lines: Sequence[str]) -> str:
    """Its complaint, or else the last line that says something; our own test of a wrong key, which it logs, says nothing."""
    spoken = (_WASMEDGE_STAMP.sub("", line) for line in reversed(lines))
    told = (line.strip() for line in spoken if line.strip() and not _SAYS_NOTHING.search(line))
    return _complaint(lines) or next(told, "")


def _complaint(lines: Sequence[str]) -> str:
    """What it called an error, empty where nothing was.

    The loader's own error says why, what stands around it only that it was given up; a panic says it in its next line.
    """
    errors = [found["text"] for line in lines if (found := _LEVELLED.match(line)) and found["level"] == "E"]
    if errors:
        return next((text for text in errors if text.startswith("error loading model")), errors[0]).strip()
    for at, line in enumerate(lines):
        if "panicked at" in line:
            after = lines[at + 1] if line.rstrip().endswith(":") and at + 1 < len(lines) else ""
            return f"{line.strip()} {after.strip()}".strip()
        if "GGML_ASSERT" in line or line.startswith("terminate called"):
            return line.strip()
    return ""
