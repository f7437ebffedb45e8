"""Measure the gateway on this machine: `make bench`, or `python -m tests.bench --help`.

Starts a throw-away installation with a stand-in engine, measures, and prints each figure beside its target. Numbers fail
nothing: the exit code is 1 only where something broke.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import NoReturn

from tests.bench import report
from tests.bench.home import MODEL, PACED_MODEL, Home, made
from tests.bench.load import HOST, LoadFailed, Target, generator
from tests.bench.measuring import Gateway, Measuring, Results
from tests.bench.stage import CORES, LOAD, MEASURED, NGINX, PINNED, NotStarted, Running, Stage, pin_ourselves
from tests.bench.upstream import PACED
from tests.conftest import free_port

SERVERS = ("daphne", "uvicorn")


@dataclass(frozen=True)
class Options:
    """What was asked for. port: of the first server, the others follow; None for free ones. upstream: instead of ours."""

    seconds: float
    servers: tuple[str, ...]
    as_json: bool
    serve: bool
    port: int | None
    upstream: str | None

    def port_of(self, place: int) -> int:
        return free_port() if self.port is None else self.port + place


def parse(arguments: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure the gateway on this machine.")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each single run (5)")
    parser.add_argument("--server", choices=(*SERVERS, "both"), default="both", help="which server the gateway runs on (both)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--serve", action="store_true", help="measure nothing: start everything, say where, wait for Ctrl-C")
    parser.add_argument("--port", type=int, help="the first of four consecutive ports to use; free ones by default")
    parser.add_argument("--upstream", metavar="URL", help="with --serve: an engine's base URL, in the place of our stand-in")
    given = parser.parse_args(arguments)
    if given.upstream and not given.serve:
        parser.error("--upstream goes with --serve: figures are of our own stand-in")
    servers = SERVERS if given.server == "both" else (given.server,)
    return Options(given.seconds, servers, given.json, given.serve, given.port, given.upstream)


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Scene:
    """What stands for the whole run."""

    options: Options
    home: Home
    stage: Stage
    upstream: Target
    engine: Running
    console: Running

    @contextmanager
    def gateway(self, server: str) -> Iterator[tuple[Target, Running]]:
        target = Target(self.options.port_of(2 + SERVERS.index(server)), self.home.key, MODEL)
        with self.stage.gateway(server, target, engine_answers=self.options.upstream is None) as running:
            yield target, running


@contextmanager
def scene(options: Options) -> Iterator[Scene]:
    """Home, Valkey, stand-in and console."""
    upstream = Target(options.port_of(0))
    root = f"http://{HOST}:{upstream.port}"
    with ExitStack() as stack:
        home = stack.enter_context(made(options.upstream or f"{root}/v1", f"{root}{PACED}/v1"))
        stage = Stage(home.folder, home.env)
        engine = stack.enter_context(stage.upstream(upstream.port))
        console = stack.enter_context(stage.console(home.console_socket))
        yield Scene(options, home, stage, upstream, engine, console)


def measure(on: Scene) -> Results:
    measuring = Measuring(on.options.seconds, say)
    direct = measuring.basics("direct", on.upstream, on.engine)
    direct_paced = measuring.direct_paced(on.upstream)
    nginx = None
    if NGINX:
        target = Target(on.options.port_of(1))
        with on.stage.nginx(target, on.upstream.port) as peer:
            nginx = measuring.peer("nginx", target, peer)
    gateways: list[Gateway] = []
    for server in on.options.servers:
        with on.gateway(server) as (target, running):
            gateways.append(measuring.gateway(server, target, on.upstream, on.home.cookie, running, on.console))
    return Results(direct, direct_paced, nginx, tuple(gateways))


def serve(on: Scene) -> None:
    """Say where everything is, and wait to be stopped."""
    with ExitStack() as stack:
        for server in on.options.servers:
            target, running = stack.enter_context(on.gateway(server))
            print(f"{server:8} http://{HOST}:{target.port}  pid {running.process.pid}")
        print(f"stand-in http://{HOST}:{on.upstream.port}  paced: http://{HOST}:{on.upstream.port}{PACED}")
        print(f"key      {on.home.key}\nmodels   {MODEL}, {PACED_MODEL}\ncookie   {on.home.cookie}\nCtrl-C ends it.", flush=True)
        while True:
            signal.pause()


def conditions(before: float) -> str:
    """Under what conditions the figures came about. before: the load average, at best about 0."""
    where = f"measured on core {MEASURED}, load on core {LOAD}" if PINNED else "not pinned: one core, or no taskset"
    return f"{where} of {len(CORES)}; load by {generator()}; load average before {before:.1f}"


def _stopped(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, _stopped)
    pin_ourselves()
    under = conditions(os.getloadavg()[0])
    try:
        with scene(options) as on:
            if options.serve:
                serve(on)
            results = measure(on)
    except (NotStarted, LoadFailed) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 0 if options.serve else 130
    if options.as_json:
        print(json.dumps({"conditions": under, **asdict(results)}, indent=1))
    else:
        print(f"{under}\n\n{report.text(results)}")
    if results.bad():
        say(f"{results.bad()} answers or streams went wrong.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
