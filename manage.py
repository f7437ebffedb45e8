#!/usr/bin/env python3
"""Entry point of every Assistant command."""

from __future__ import annotations

import os
import sys

# These processes serve requests all day: they load no admin, no DRF, no Celery.
LEAN_COMMANDS = {"gateway", "grpcserver"}


def main() -> None:
    """Run one management command with the settings that fit its process."""
    lean = len(sys.argv) > 1 and sys.argv[1] in LEAN_COMMANDS
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "assistant_site.settings_gateway" if lean else "assistant_site.settings")
    try:
        from django.core.management import execute_from_command_line
    except ImportError as error:
        raise SystemExit("Django is not installed here. Run `make run`, or use .venv/bin/python manage.py.") from error
    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
