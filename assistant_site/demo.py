"""The demo model: fetched, described and served once, so that the first request of a newcomer is answered.

Runs as a process of its own under `up` (demo_process.py), so that a slow download holds up nothing and stops when `up`
stops. A demo that was deleted stays deleted.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from django.conf import settings
from django.db import transaction

from models_app import catalog
from models_app.downloads import fetch
from models_app.management.commands.fetch_model import ProgressLine
from models_app.models import Instance, ModelAlias, ModelConfig, State
from models_app.tasks import request_reconcile

NAME = catalog.DEMO
ALIAS = "demo"
CTX_SIZE = 4096  # tokens per request
SLOTS = 2
READY_S = 300.0
POLL_S = 0.3


def wanted() -> bool:
    """There is something to do: a first start, or a demo that is to be served."""
    if not settings.ASSISTANT_DEMO_MODEL:
        return False
    return not _marker().exists() or ModelConfig.objects.enabled().filter(name=NAME).exists()


def create() -> None:
    """Fetch the file and describe the model, unless that has been done once. Raises DownloadError, CatalogError."""
    if _marker().exists():
        return
    if not ModelConfig.objects.filter(name=NAME).exists():
        progress = ProgressLine(sys.stderr, NAME)
        try:
            path = fetch(catalog.entry(NAME), settings.ASSISTANT_MODEL_DIRS[0], progress)
        finally:
            progress.close()
        _describe(path)
    _marker().touch(mode=0o600)


def wait_ready() -> bool:
    """Tell every change of state until an instance is ready; False where that is not to be expected any more."""
    told = ""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        instance = Instance.objects.current().filter(model__name=NAME).first()
        if (line := f"{NAME} {_in_words(instance)}") != told:
            sys.stderr.write(line + "\n")
            told = line
        if instance and instance.state == State.READY:
            return True
        if instance and instance.state == State.CRASH_LOOP:
            return False
        time.sleep(POLL_S)
    sys.stderr.write(f"{NAME} is not ready after {READY_S:.0f} s; the Instances page of the admin says more\n")
    return False


def _marker() -> Path:
    """This file says that the demo has been there once."""
    return Path(settings.ASSISTANT_HOME / "demo_model")


def _describe(path: Path) -> None:
    with transaction.atomic():
        model = ModelConfig.objects.create(name=NAME, chat_model_path=str(path), ctx_size=CTX_SIZE, slots=SLOTS)
        if not ModelConfig.objects.filter(name=ALIAS).exists():
            ModelAlias.objects.get_or_create(name=ALIAS, defaults={"model": model})
        request_reconcile()


def _in_words(instance: Instance | None) -> str:
    if instance is None:
        return "waits for a worker"
    words = f"is {instance.state.lower().replace('_', ' ')}"
    return f"{words}: {instance.exit_reason}" if instance.state in (State.FAILED, State.CRASH_LOOP) else words
