"""A database of the first release becomes one of this release with everything in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.core.management import call_command
from django.db import connection
from django.db.migrations.executor import MigrationExecutor

from models_app.models import Instance, Revision, State, triggers

FIRST = [("models_app", "0001_initial")]


@pytest.fixture
def first_release(transactional_db: None) -> Iterator[None]:
    call_command("migrate", "models_app", "0001", verbosity=0)
    yield
    call_command("migrate", verbosity=0)


def present() -> set[tuple[str, str]]:
    with connection.cursor() as cursor:
        cursor.execute(triggers.PRESENT[connection.vendor], [])
        return set(cursor.fetchall())


@pytest.mark.usefixtures("first_release")
def test_rows_and_counting_survive_the_upgrade() -> None:
    old = MigrationExecutor(connection).loader.project_state(FIRST).apps
    node = old.get_model("models_app", "Node").objects.create(name="n")
    model = old.get_model("models_app", "ModelConfig").objects.create(name="m", chat_model_path="m.gguf")
    old.get_model("models_app", "Instance").objects.create(
        model=model, model_name="m", node=node, engine="embedded", state="READY", generation=3, port=20001, pid=7, start_ticks=1
    )
    call_command("migrate", verbosity=0)
    instance = Instance.objects.get()
    assert (instance.state, instance.generation, instance.part, instance.launch) == (State.READY, 3, "chat", {})
    assert present() == triggers.expected(connection.vendor)
    before = Revision.objects.get().value
    Instance.objects.update(part="embedding")
    assert Revision.objects.get().value > before


@pytest.mark.usefixtures("transactional_db")
def test_a_migrate_with_nothing_to_do_leaves_no_moment_without_triggers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes meanwhile would not be counted."""
    removed: list[object] = []
    monkeypatch.setattr(triggers, "remove", removed.append)
    call_command("migrate", verbosity=0)
    assert removed == []
    assert present() == triggers.expected(connection.vendor)
