"""A throw-away installation: migrated, with one stand-in engine as a remote server, keys, and a logged-in administrator.

Makes Django's settings read the home it is given, so nothing of Django may be imported before `made()`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MODEL: Final = "m"
PACED_MODEL: Final = "paced"
KEYS: Final = 500  # rows of the admin list
MAX_IN_FLIGHT: Final = 2048  # what is measured is not the queue
SETTINGS: Final = "assistant_site.settings"
_ELSEWHERE: Final = ("DATABASE_URL", "REDIS_URL", "ASSISTANT_CONFIG", "DJANGO_SETTINGS_MODULE")


@dataclass(frozen=True)
class Home:
    """key: of an ordinary user. cookie: a superuser's session. env: for processes of this installation."""

    folder: Path
    console_socket: Path
    key: str
    cookie: str
    env: dict[str, str]


@contextmanager
def made(upstream: str, paced: str) -> Iterator[Home]:
    """An installation whose Valkey runs as long as the block. upstream, paced: base URLs of the engines of the two models."""
    folder = Path(tempfile.mkdtemp(prefix="ast-bench-"))
    try:
        env = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
        env |= {"ASSISTANT_HOME": str(folder), "ASSISTANT_DRAIN_S": "1", "ASSISTANT_LOG_LEVEL": "WARNING"}
        os.environ.clear()
        os.environ.update(env, DJANGO_SETTINGS_MODULE=SETTINGS)
        _set_up()
        from django.conf import settings

        from assistant_site import valkey

        key, cookie = _seed(upstream, paced)
        with valkey.running():
            yield Home(folder, settings.ASSISTANT_CONSOLE_SOCKET, key, cookie, env)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _set_up() -> None:
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0)


def _seed(upstream: str, paced: str) -> tuple[str, str]:
    """The text of the key to use, and the session's cookie."""
    from django.conf import settings
    from django.contrib.auth.models import User
    from django.db import connections
    from django.test import Client

    from models_app.keys import create_key
    from models_app.models import RemoteServer

    for model, address in ((MODEL, upstream), (PACED_MODEL, paced)):
        RemoteServer.objects.create(
            name=f"stand-in {model}", kind="openai", address=address, models={model: model}, max_in_flight=MAX_IN_FLIGHT
        )
    user = User.objects.create_user("bench")
    _, text = create_key(user, "bench")
    for number in range(KEYS - 1):
        create_key(user, f"key {number}")
    browser = Client()
    browser.force_login(User.objects.create_superuser("admin"))
    cookie = f"{settings.SESSION_COOKIE_NAME}={browser.cookies[settings.SESSION_COOKIE_NAME].value}"
    connections.close_all()
    return text, cookie
