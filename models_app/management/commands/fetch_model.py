"""`manage.py fetch_model NAME`: bring a model of the catalogue into the models folder."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from models_app import catalog
from models_app.downloads import Phase, fetch
from models_app.exceptions import AssistantError

BAR_WIDTH = 30  # characters
REDRAW_S = 0.1  # on a terminal
LINE_S = 1.0  # elsewhere: at most one line in this time


class Command(BaseCommand):
    """Fetch one catalogue entry; its path alone goes to standard output, progress to standard error."""

    help = "Fetch a model of the catalogue (a second call only verifies it) and print its path."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", nargs="?", help="name of the model in the catalogue")
        parser.add_argument("--list", action="store_true", help="list the catalogue and fetch nothing")
        parser.add_argument("--dest", type=Path, metavar="DIR", help="folder to put it into; default: the models folder")
        parser.add_argument("--catalog", type=Path, metavar="FILE", default=catalog.BUILT_IN, help="another catalogue (TOML)")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run_from_argv(self, argv: list[str]) -> None:
        # A TERM must end the fetch as Ctrl-C does, or it would leave pip and its files behind.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        super().run_from_argv(argv)

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            if options["list"]:
                self._list(list(catalog.load(options["catalog"]).values()), as_json=options["json"])
            elif options["name"]:
                self._fetch(catalog.entry(options["name"], options["catalog"]), options["dest"], as_json=options["json"])
            else:
                raise CommandError("Name a model of the catalogue, or use --list to see them.")
        except AssistantError as error:
            raise CommandError(str(error)) from error
        except KeyboardInterrupt:
            raise CommandError("Cancelled; the same command goes on where it can.", returncode=130) from None

    def _list(self, entries: list[catalog.Entry], *, as_json: bool) -> None:
        if as_json:
            self.stdout.write(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=2))
            return
        for entry in entries:
            size = f"{entry.bytes / 1e6:,.0f} MB"
            self.stdout.write(f"{entry.name}  {size}  {entry.licence}  context {entry.ctx:,}  {entry.title}")

    def _fetch(self, entry: catalog.Entry, dest: Path | None, *, as_json: bool) -> None:
        folder = (dest or Path(settings.ASSISTANT_MODEL_DIRS[0])).expanduser().resolve()
        progress = ProgressLine(sys.stderr, entry.name)
        try:
            path = fetch(entry, folder, progress)
        finally:
            progress.close()
        self.stdout.write(json.dumps({**dataclasses.asdict(entry), "path": str(path)}) if as_json else str(path))


class ProgressLine:
    """Draws progress: one line redrawn on a terminal, plain lines elsewhere, so that a log stays readable."""

    def __init__(self, out: TextIO, title: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._title = title
        self._clock = clock
        self._terminal = out.isatty()
        self._last_phase: Phase | None = None
        self._last_at = 0.0

    def __call__(self, done: int, total: int | None, phase: Phase, /) -> None:
        now = self._clock()
        due = now - self._last_at >= (REDRAW_S if self._terminal else LINE_S)
        if not due and (phase is self._last_phase or not self._terminal):
            return
        if self._terminal and self._last_phase not in (None, phase):
            self._out.write("\n")
        self._last_at, self._last_phase = now, phase
        text = f"{self._title}: {phase} {_amount(done, total)}".rstrip()
        if self._terminal:
            self._out.write(f"\r{text} {_bar(done, total)}\x1b[K")
            self._out.flush()
        else:
            self._out.write(f"{text}\n")

    def close(self) -> None:
        """End the line being drawn."""
        if self._terminal and self._last_phase is not None:
            self._out.write("\n")
            self._out.flush()


def _amount(done: int, total: int | None) -> str:
    if total is None:
        return f"{done / 1e6:,.1f} MB" if done else ""
    return f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB"


def _bar(done: int, total: int | None) -> str:
    if not total:
        return ""
    filled = min(BAR_WIDTH, BAR_WIDTH * done // total)
    return f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}]"
