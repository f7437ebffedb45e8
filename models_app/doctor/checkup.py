"""The list of all checks, and how it is run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
from django.conf import settings
from django.db import DatabaseError

from models_app.doctor import (
    broker,
    clock,
    database,
    engines,
    exposure,
    gateways,
    listeners,
    model_files,
    packages,
    resources,
    streaming,
    workers,
)
from models_app.doctor.finding import Check, Context, Finding, fail, ok, warn
from models_app.exceptions import AssistantError

DATABASE, BROKER = "database", "broker"


def check_platform(context: Context) -> Iterable[Finding]:
    home = settings.ASSISTANT_HOME
    yield ok(f"Assistant runs here, its home is {home}.") if context.running else warn(f"Assistant does not run here ({home}).")


# In this order: what others need comes first, and what concerns it stands together.
CHECKS = (
    Check("platform", check_platform),
    Check("packages", packages.check),
    Check("database", database.check),
    Check("broker", broker.check),
    Check("files", exposure.check_files),
    Check("addresses", exposure.check_addresses),
    Check("addresses", listeners.check_public),
    Check("engines", engines.check),
    Check("engine ports", listeners.check_engine_ports),
    Check("engine ports", listeners.check_fixed, needs=(DATABASE,)),
    Check("models", model_files.check, needs=(DATABASE,)),
    Check("models", model_files.check_hashes, needs=(DATABASE,), slow=True),
    Check("disk", resources.check_disk),
    Check("memory", resources.check_memory),
    Check("clock", clock.check_local),
    Check("clock", clock.check_database, needs=(DATABASE,)),
    Check("nodes", workers.check_nodes, needs=(DATABASE, BROKER)),
    Check("workers", workers.check_queues, needs=(BROKER,)),
    Check("workers", workers.check_beat, needs=(BROKER,)),
    Check("gateways", gateways.check_alive, needs=(BROKER,)),
    Check("usage", gateways.check_spool),
    Check("streaming", streaming.check),
)


def run(context: Context, checks: Sequence[Check] = CHECKS) -> Iterator[Finding]:
    """Findings as they are made, each with its check's name."""
    for check in checks:
        if check.slow and context.fast:
            continue
        yield from (replace(finding, check=check.name) for finding in _findings(check, context))


def _findings(check: Check, context: Context) -> Iterable[Finding]:
    """One check to its end, however it ends."""
    absent = [context.missing[need] for need in check.needs if need in context.missing]
    if absent:
        return [warn(f"Not looked at: {absent[0]}.")]
    findings: list[Finding] = []
    try:
        for finding in check.run(context):
            findings.append(finding)  # noqa: PERF402  # what came before an error counts
    except AssistantError as error:
        findings.append(fail(f"This could not be looked at: {error}"))
    except (DatabaseError, OSError, psutil.Error) as error:
        findings.append(fail(f"This could not be looked at: {' '.join(str(error).split()) or type(error).__name__}."))
    return findings


def running_here() -> bool:
    """Whether an `up` holds this home (the pid in its lock file is that of one), or a gateway has our public address."""
    with suppress(OSError, ValueError, psutil.Error):
        pid = int((Path(settings.ASSISTANT_RUN_DIR) / "up.lock").read_text())
        if "up" in psutil.Process(pid).cmdline():
            return True
    found = listeners.listener(settings.ASSISTANT_HTTP_ADDR[1])
    return found is not None and "gateway" in found.argv
