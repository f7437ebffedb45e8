"""`manage.py create_api_key`: make a key and print it, alone, on standard output."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import httpx
from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser

from models_app import keys
from models_app.models import APIKey
from models_app.models.api_key import INFERENCE, SCOPES

SEEN_WITHIN_S = 2.0
POLL_S = 0.1


class Command(BaseCommand):
    help = "Make an API key and print it, alone, on standard output, once a running gateway knows it or 2 s have passed."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--user", required=True, help="whose key it is")
        parser.add_argument("--name", required=True, help="what the key is for; unique among the user's keys")
        parser.add_argument("--scope", action="append", default=[], choices=SCOPES, help="a scope besides inference")
        parser.add_argument("--model", action="append", default=[], help="a model it may use (repeat); none means all")
        parser.add_argument("--rpm", type=int, help="requests per minute")
        parser.add_argument("--tpm", type=int, help="tokens per minute")
        parser.add_argument("--parallel", type=int, help="requests at the same time")
        parser.add_argument("--json", action="store_true", help="print an object instead: key, id, public_id, user, name, …")

    def handle(self, *_: Any, **options: Any) -> None:
        users = get_user_model().objects.filter(username=options["user"])
        user = users.first()
        if user is None:
            raise CommandError(
                f"There is no user “{options['user']}”. Add one at /admin/auth/user/add/ or with `manage.py createsuperuser`."
            )
        try:
            key, text = keys.create_key(
                user,
                options["name"],
                scopes=[INFERENCE, *options["scope"]],
                models=options["model"],
                rpm=options["rpm"],
                tpm=options["tpm"],
                parallel=options["parallel"],
            )
        except ValidationError as error:
            raise CommandError(_sentence(error)) from None
        wait_until_seen(text, settings.ASSISTANT_HTTP_ADDR)
        self.stdout.write(json.dumps(_described(key, text)) if options["json"] else text)


def wait_until_seen(text: str, address: tuple[str, int]) -> bool:
    """Ask the gateway with the key until it is known there. At most 2 s; at once where nothing listens."""
    host, port = address
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # where to connect, not what to bind
    url = f"http://[{host}]:{port}/v1/models" if ":" in host else f"http://{host}:{port}/v1/models"
    deadline = time.monotonic() + SEEN_WITHIN_S
    with httpx.Client(trust_env=False, headers={"Authorization": f"Bearer {text}"}) as client:
        while (left := deadline - time.monotonic()) > 0:
            try:
                status = client.get(url, timeout=left).status_code
            except httpx.ConnectError:
                return False
            except httpx.HTTPError:
                status = 503  # it listens and is not well; perhaps it is starting
            if status != 401 and status < 500:
                return True
            time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))
    sys.stderr.write("The gateway did not confirm the key within 2 s; it will know it once its database connection is back.\n")
    return False


def _described(key: APIKey, text: str) -> dict[str, Any]:
    return {
        "key": text,
        "id": key.pk,
        "public_id": key.public_id,
        "user": key.user.get_username(),
        "name": key.name,
        "scopes": key.scopes,
        "models": key.models,
        "rpm": key.rpm,
        "tpm": key.tpm,
        "parallel": key.parallel,
    }


def _sentence(error: ValidationError) -> str:
    """Field by field, as the options are called."""
    options = {"scopes": "--scope", "models": "--model"}
    return " ".join(
        " ".join(messages) if field == "__all__" else f"{options.get(field, '--' + field)}: {' '.join(messages)}"
        for field, messages in error.message_dict.items()
    )
