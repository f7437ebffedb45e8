"""A small `up` for the tests: lock, sweep and supervisor around programs given as JSON, run as a process of its own.

usage: python -m tests.integration.supervised_programs FOLDER < JSON list of programs
Each program: {"name", "code" (Python), "level", "stop_order", "ready" (a file that must exist), "once", "stop_timeout_s"}.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from assistant_site.previous_life import MARK, AlreadyRunning, end_survivors, mark_of, only_one
from assistant_site.program_log import Output
from assistant_site.supervised import Probe, Program
from assistant_site.supervisor import StartFailed, StopStep, Supervisor


def probe(file: Path) -> Probe:
    async def exists(_pid: int) -> bool:
        return file.exists()

    return exists


def program(folder: Path, wanted: dict[str, Any]) -> Program:
    return Program(
        name=wanted["name"],
        argv=[sys.executable, "-S", "-u", "-c", wanted["code"], str(folder)],
        env={**os.environ, MARK: mark_of(folder)},
        level=wanted.get("level", 0),
        stop_order=wanted.get("stop_order", 0),
        ready=probe(folder / wanted["ready"]) if "ready" in wanted else None,
        stop_timeout_s=wanted.get("stop_timeout_s", 5.0),
        hint=wanted.get("hint", ""),
    )


async def run(folder: Path, programs: list[Program]) -> int:
    output = Output(sys.stdout.fileno())
    step = StopStep("step", 5, lambda hurry: output.write(f"the step runs, hurry is {hurry}\n".encode()), 5.0)
    supervisor = Supervisor(programs, output=output, log_folder=folder / "logs", steps=[step])
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, lambda: supervisor.hurry() if stop.is_set() else stop.set())
    code = 0
    try:
        await supervisor.start()
        supervisor.say(f"all ready {json.dumps(supervisor.pids())}")
        await stop.wait()
    except StartFailed as error:
        supervisor.say(str(error))
        code = 1
    await supervisor.stop()
    output.close()
    return code


def main() -> int:
    folder = Path(sys.argv[1])
    (folder / "logs").mkdir(exist_ok=True)
    try:
        with only_one(folder / "up.lock"):
            ended, left = end_survivors(mark_of(folder), grace_s=0.5)
            with suppress(BrokenPipeError):
                print(f"survivors ended: {ended}, left: {left}", flush=True)  # noqa: T201
            return asyncio.run(run(folder, [program(folder, wanted) for wanted in json.load(sys.stdin)]))
    except AlreadyRunning as error:
        print(error, flush=True)  # noqa: T201
        return 1


if __name__ == "__main__":
    sys.exit(main())
