"""`manage.py fetch_engine`: bring llama-api-server.wasm, what the wasmedge engine runs, to its place."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from models_app.downloads import fetch, size_of
from models_app.engines import wasmedge_runtime
from models_app.exceptions import AssistantError, PreflightError
from models_app.management.commands.fetch_model import ProgressLine


@dataclass(frozen=True, slots=True)
class EngineFile:
    """What downloads must know of a file."""

    source: str
    file: str
    sha256: str
    bytes: int


class Command(BaseCommand):
    """Fetch ASSISTANT_WASM_URL into ASSISTANT_WASM_FILE; its path goes to standard output, progress to standard error."""

    help = (
        "Fetch llama-api-server.wasm from ASSISTANT_WASM_URL into ASSISTANT_WASM_FILE (a second call only verifies it), and "
        "print its path. Nothing is fetched unless ASSISTANT_WASM_SHA256 pins it."
    )
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run_from_argv(self, argv: list[str]) -> None:
        # A TERM must end the fetch as Ctrl-C does, or it would leave a half-written file's lock behind.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        super().run_from_argv(argv)

    def handle(self, *args: Any, **options: Any) -> None:
        target: Path = settings.ASSISTANT_WASM_FILE
        sha256: str = settings.ASSISTANT_WASM_SHA256
        try:
            _check_pinned(settings.ASSISTANT_WASM_URL, sha256)
            # A file that is there is only verified; the network is not asked.
            size = target.stat().st_size if target.exists() else size_of(settings.ASSISTANT_WASM_URL)
            path = self._fetch(EngineFile(settings.ASSISTANT_WASM_URL, target.name, sha256, size), target.parent)
        except AssistantError as error:
            raise CommandError(str(error)) from error
        except KeyboardInterrupt:
            raise CommandError("Cancelled; the same command goes on where it can.", returncode=130) from None
        self.stdout.write(json.dumps({"path": str(path), "sha256": sha256}) if options["json"] else str(path))

    def _fetch(self, wanted: EngineFile, folder: Path) -> Path:
        progress = ProgressLine(sys.stderr, wanted.file)
        try:
            return fetch(wanted, folder, progress)
        finally:
            progress.close()


def _check_pinned(url: str, sha256: str) -> None:
    """A version and a checksum must be named: what “latest” is changes under the checksum."""
    wasmedge_runtime.check_pin(sha256)
    if "/latest/" in url:
        raise PreflightError("ASSISTANT_WASM_URL names “latest”; name a release by its version, as its checksum does.")
