"""`python -m assistant_site.demo_process`: exits with 0 when the demo model is served."""

from __future__ import annotations

import signal
import sys

import django

signal.signal(signal.SIGTERM, signal.default_int_handler)
django.setup()

from assistant_site import demo  # noqa: E402  # models can be imported only now
from models_app.exceptions import AssistantError  # noqa: E402

INTERRUPTED = 130


def main() -> int:
    """Fetch, describe, wait."""
    try:
        demo.create()
        return 0 if demo.wait_ready() else 1
    except AssistantError as error:
        sys.stderr.write(f"The demo model is not served: {error} The next start tries again.\n")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
