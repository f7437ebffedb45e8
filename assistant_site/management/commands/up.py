"""`manage.py up`: the whole platform on one machine."""

from __future__ import annotations

import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from assistant_site import up
from assistant_site.previous_life import AlreadyRunning


class Command(BaseCommand):
    """Run everything under one supervisor until Ctrl-C or TERM."""

    help = "Run the whole platform on this machine: migrations, broker, workers, servers and the demo model."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--keep-engines", action="store_true", help="Leave the engines running on stop; the next `up` takes them over."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            sys.exit(up.run(keep_engines=options["keep_engines"]))
        except (up.CannotStart, AlreadyRunning) as error:
            self.stderr.write(str(error))
            sys.exit(1)
