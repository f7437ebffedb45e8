"""What a new installation gets once: the superuser `admin` and a key for the first curl. Nothing is ever overwritten."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from django.contrib.auth.models import User
from django.db import transaction

from assistant_site import env
from models_app.contracts import key_material
from models_app.keys import create_key
from models_app.models import APIKey

ADMIN = "admin"
ADMIN_PASSWORD_FILE = "admin_password"  # noqa: S105  # a file's name
KEY_NAME = "quick start"
KEY_FILE = "quickstart_key"


@dataclass(frozen=True)
class Admin:
    """Where the superuser's password is. `new_password` is set only by the call that made it up."""

    created: bool
    password_file: Path | None
    new_password: str = ""


def ensure_admin(home: Path) -> Admin:
    """Make the superuser where there is none. A password that was given to us is kept nowhere but, hashed, in the database."""
    file = env.private_folder(home / "secrets") / ADMIN_PASSWORD_FILE
    if User.objects.filter(is_superuser=True).exists() or User.objects.filter(username=ADMIN).exists():
        return Admin(created=False, password_file=file if file.exists() else None)
    given = os.environ.get("ASSISTANT_ADMIN_PASSWORD", "")
    password = given or env.secret(home, ADMIN_PASSWORD_FILE)
    User.objects.create_superuser(ADMIN, password=password)
    if given:
        return Admin(created=True, password_file=None)
    return Admin(created=True, password_file=file, new_password=password)


def quick_start_key(home: Path, *, new_installation: bool) -> str:
    """The text of the key for the printed curl; empty where it was revoked or deleted, which is respected."""
    file = env.private_folder(home / "secrets") / KEY_FILE
    if new_installation:
        file.unlink(missing_ok=True)  # of a database that is no more
    if file.exists():
        text = file.read_text().strip()
        return text if APIKey.objects.usable().filter(digest=key_material.digest(text)).exists() else ""
    user = User.objects.filter(username=ADMIN, is_active=True).first()
    if user is None or APIKey.objects.filter(user=user, name=KEY_NAME).exists():
        return ""
    # The file first, then the commit: a crash between them leaves a text that is no key, and the next start says so.
    with transaction.atomic():
        _, text = create_key(user, KEY_NAME)
        env.write_secret(file, text)
    return text
