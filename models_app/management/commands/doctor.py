"""`manage.py doctor`: look at everything Assistant needs and say what is wrong and what to do."""

from __future__ import annotations

import os
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from models_app.doctor import checkup, finding


class Command(BaseCommand):
    help = "Check packages, engines, models, ports, broker, database, disk, memory, clock, workers and streaming."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.add_argument("--fast", action="store_true", help="leave out what takes long: hashes, whole scans")
        parser.add_argument("--public-url", default="", help="where clients reach us, to test streaming through every proxy")

    def handle(self, *_: Any, **options: Any) -> None:
        os.environ.setdefault("PGCONNECT_TIMEOUT", "5")  # seconds; a server that swallows packets must not hold us up
        context = finding.Context(options["fast"], options["public_url"], checkup.running_here())
        findings = list(checkup.run(context))
        if options["json"]:
            self.stdout.write(finding.as_json(findings))
        else:
            colour = self.stdout.isatty() and "NO_COLOR" not in os.environ
            self.stdout.write(finding.as_text(findings, colour))
        sys.exit(finding.exit_code(findings))
