"""The revision counter: every path that changes what a gateway must know is counted, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connection, models, transaction

from models_app.models import APIKey, Instance, ModelAlias, ModelConfig, Node, RemoteServer, Revision, Tombstone
from models_app.models.triggers import WATCHED

pytestmark = pytest.mark.django_db


def value() -> int:
    return Revision.objects.get().value


@pytest.fixture
def alice() -> User:
    return User.objects.create_user("alice")


def make_key(user: User, number: int = 1) -> APIKey:
    return APIKey.objects.create(user=user, name=f"key {number}", public_id=f"{number:010}", digest=f"{number:064}")


def make_model() -> ModelConfig:
    return ModelConfig.objects.create(name="m", chat_model_path="/m.gguf")


def make_instance() -> Instance:
    return Instance.objects.create(model=make_model(), model_name="m", node=Node.objects.create(name="n"), engine="embedded")


@pytest.mark.parametrize(
    "make",
    [
        make_model,
        lambda: ModelAlias.objects.create(name="a", model=make_model()),
        make_instance,
        lambda: RemoteServer.objects.create(name="r", address="http://127.0.0.1:1/v1"),
        lambda: make_key(User.objects.create_user("bob")),
    ],
    ids=["model", "alias", "instance", "remote", "key"],
)
def test_a_new_row_carries_the_newest_revision_and_a_deleted_one_leaves_a_tombstone(make: Callable[[], models.Model]) -> None:
    row = make()
    row.refresh_from_db()
    assert row.revision == value()  # type: ignore[attr-defined]
    pk, table = row.pk, row._meta.db_table
    row.delete()
    assert Tombstone.objects.get(table_name=table, row_id=pk).revision == value()


def test_bulk_updates_are_counted_and_stamp_every_row(alice: User) -> None:
    for number in range(3):
        make_key(alice, number)
    before = value()
    APIKey.objects.filter(user=alice).update(weight=2.0)
    assert value() > before
    assert APIKey.objects.filter(revision__gt=before).count() == 3


def test_a_stale_object_saved_whole_still_gets_a_new_stamp(alice: User) -> None:
    key = make_key(alice)
    assert key.revision == 0  # as loaded before the trigger ran
    key.name = "renamed"
    key.save()
    key.refresh_from_db()
    assert key.revision == value()


def test_what_a_gateway_need_not_know_is_not_counted(alice: User) -> None:
    key = make_key(alice)
    instance = make_instance()
    before = value()
    key.last_used_at = None
    key.save(update_fields=["last_used_at"])
    instance.exit_reason = "x"
    instance.save(update_fields=["exit_reason"])
    alice.first_name = "Alice"
    alice.save(update_fields=["first_name"])
    assert value() == before


def test_deactivating_a_user_stamps_the_users_keys_and_nobody_elses(alice: User) -> None:
    make_key(alice, 1)
    other = make_key(User.objects.create_user("bob"), 2)
    before = value()
    User.objects.filter(pk=alice.pk).update(is_active=False)
    assert set(APIKey.objects.filter(revision__gt=before).values_list("user__username", flat=True)) == {"alice"}
    assert not APIKey.objects.usable().exclude(pk=other.pk).exists()


def test_moving_a_node_stamps_its_instances() -> None:
    instance = make_instance()
    before = value()
    Node.objects.update(address="10.1.2.3")
    instance.refresh_from_db()
    assert instance.revision > before


def test_deleting_a_user_buries_the_keys(alice: User) -> None:
    key = make_key(alice)
    alice.delete()
    assert Tombstone.objects.filter(table_name="models_app_apikey", row_id=key.pk).exists()


def test_a_rolled_back_change_is_not_counted(alice: User) -> None:
    before = value()
    with transaction.atomic():
        make_key(alice)
        assert value() > before
        transaction.set_rollback(True)
    assert value() == before


def test_migrate_starts_a_new_epoch() -> None:
    before = Revision.objects.get()
    call_command("migrate", verbosity=0)
    after = Revision.objects.get()
    assert after.epoch != before.epoch
    assert after.value >= before.value


def test_every_watched_column_exists() -> None:
    with connection.cursor() as cursor:
        for watched in WATCHED:
            columns = {column.name for column in connection.introspection.get_table_description(cursor, watched.table)}
            assert set(watched.columns) <= columns, watched.table
