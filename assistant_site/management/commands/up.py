"""`manage.py up`: the whole platform on one machine."""

from __future__ import annotations

import sys
from typing import Any

from django.core.management.base import BaseCommand

from assistant_site import up
from assistant_site.previous_life import AlreadyRunning


class Command(BaseCommand):
    """Run everything under one supervisor until Ctrl-C or TERM."""

    help = "Run the whole platform on this machine: migrations, broker, workers, servers and the demo model."

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            sys.exit(up.run())
        except (up.CannotStart, AlreadyRunning) as error:
            self.stderr.write(str(error))
            sys.exit(1)
