"""Settings of the test suite: the real ones over a private, throw-away home."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Short: socket paths must fit. Set before the real settings read it.
_HOME = tempfile.mkdtemp(prefix="ast-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ["ASSISTANT_HOME"] = _HOME
os.environ.pop("REDIS_URL", None)

from assistant_site.settings import *  # noqa: E402, F403

PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]  # fast; tests check no hash strength

if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":  # noqa: F405
    # A file, as in production: threads with connections of their own lock each other out of a shared in-memory database.
    DATABASES["default"]["TEST"] = {"NAME": f"{_HOME}/test.sqlite3"}  # noqa: F405
