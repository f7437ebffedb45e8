"""What an administrator does in the admin: make a key and see it once, save a model, press the buttons."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.contrib.sessions.models import Session
from django.db import connection
from django.test import Client
from django.urls import reverse

from models_app import keys
from models_app.contracts import key_material, secret_box
from models_app.models import APIKey, Instance, ModelAlias, ModelConfig, Node, RemoteServer
from tests.fakes import gguf_files

pytestmark = pytest.mark.django_db

Captured = Callable[..., AbstractContextManager[list[Callable[[], Any]]]]
CONFIRM = {"_form_submitted": "true"}
KEY_FORM = {"name": "laptop", "scopes": ["inference"], "priority": "normal", "weight": "1"}


@pytest.fixture
def boss() -> User:
    return User.objects.create_superuser("boss", password="battery staple")


@pytest.fixture
def browser(boss: User) -> Client:
    client = Client()
    client.force_login(boss)
    return client


@pytest.fixture
def folder(tmp_path: Path, settings: Any) -> Path:
    """The one folder model files may lie in, with one file."""
    models = tmp_path / "models"
    models.mkdir()
    gguf_files.llama(models / "small.gguf")
    settings.ASSISTANT_MODEL_DIRS = [models]
    return models


def model_form(**given: Any) -> dict[str, Any]:
    return {
        "name": "small", "engine": "embedded", "chat_model_path": "small.gguf", "embedding_model_path": "", "tts_model_path": "",
        "prompt_template": "", "ctx_size": 4096, "batch_size": 512, "slots": 2, "threads": 0, "gpu_layers": 0, "extra_args": "{}",
        "min_replicas": 1, "max_replicas": 1, "idle_timeout_s": 0, "priority": 0, "port": "", "enabled": "on", **given,
    }  # fmt: skip


def errors_of(answer: Any) -> dict[str, list[str]]:
    """The errors of the form a page came back with."""
    return dict(answer.context["adminform"].form.errors)


def url(name: str, *args: Any) -> str:
    return reverse(f"admin:models_app_{name}", args=args)


# keys


def test_a_new_key_is_shown_in_one_answer_and_is_nowhere_else(browser: Client, boss: User) -> None:
    answer = browser.post(url("apikey_add"), {**KEY_FORM, "user": boss.pk, "rpm": "60"})
    assert answer.status_code == 200
    assert "no-store" in answer["Cache-Control"]
    text = answer.context["text"]
    assert answer.content.decode().count(text) == 1
    key = APIKey.objects.get()
    assert (key.digest, key.rpm, key.scopes) == (key_material.digest(text), 60, ["inference"])
    secret = text[len("ast_") + key_material.PUBLIC_ID_LENGTH + 1 :]
    for address in (url("apikey_change", key.pk), url("apikey_changelist"), url("apikey_history", key.pk)):
        page = browser.get(address)
        assert page.status_code == 200
        assert secret not in page.content.decode()
    with connection.cursor() as cursor:
        for table in connection.introspection.table_names():
            cursor.execute(f"SELECT * FROM {connection.ops.quote_name(table)}")
            assert secret not in repr(cursor.fetchall()), table
    assert all(secret not in repr(session.get_decoded()) for session in Session.objects.all())
    assert LogEntry.objects.filter(object_id=str(key.pk)).exists()


def test_the_form_posted_again_shows_no_key(browser: Client, boss: User) -> None:
    form = {**KEY_FORM, "user": boss.pk}
    text = browser.post(url("apikey_add"), form).context["text"]
    again = browser.post(url("apikey_add"), form)
    assert text not in again.content.decode()
    assert "already has a key named" in errors_of(again)["name"][0]
    assert APIKey.objects.count() == 1


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"user": ""}, "user"),
        ({"name": ""}, "name"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes"),
        ({"models": ["none"]}, "models"),
        ({"rpm": "0"}, "rpm"),
        ({"expires_at_0": "2001-01-01", "expires_at_1": "00:00"}, "expires_at"),
    ],
)
def test_a_bad_key_form_comes_back_with_the_error_at_its_field(
    browser: Client, boss: User, given: dict[str, Any], field: str
) -> None:
    answer = browser.post(url("apikey_add"), {**KEY_FORM, "user": boss.pk, **given})
    assert list(errors_of(answer)) == [field]
    assert len(errors_of(answer)[field]) == 1
    assert not APIKey.objects.exists()


def test_staff_cannot_make_an_admin_key_of_a_superuser(boss: User) -> None:
    sam = User.objects.create_user("sam", is_staff=True)
    sam.user_permissions.add(*Permission.objects.filter(codename__in=("add_apikey", "view_apikey")))
    browser = Client()
    browser.force_login(sam)
    answer = browser.post(url("apikey_add"), {**KEY_FORM, "user": boss.pk, "scopes": ["admin"]})
    assert "Only a superuser" in errors_of(answer)["scopes"][0]
    assert not APIKey.objects.exists()


def test_limits_of_a_key_are_changed_and_its_owner_is_not(browser: Client, boss: User) -> None:
    alice = User.objects.create_user("alice")
    key, _ = keys.create_key(alice, "laptop")
    answer = browser.post(url("apikey_change", key.pk), {**KEY_FORM, "user": boss.pk, "rpm": "5", "models": []})
    assert answer.status_code == 302
    key.refresh_from_db()
    assert (key.rpm, key.user) == (5, alice)


def test_a_key_is_revoked_by_the_dialog_and_cannot_be_edited_afterwards(browser: Client, boss: User) -> None:
    key, _ = keys.create_key(boss, "laptop")
    assert "for good" in browser.get(url("apikey_revoke", key.pk)).content.decode()
    answer = browser.post(url("apikey_revoke", key.pk), CONFIRM, headers={"HX-Request": "true"})
    assert (answer.status_code, answer["HX-Redirect"]) == (200, url("apikey_changelist"))
    key.refresh_from_db()
    assert key.revoked_at is not None
    assert browser.post(url("apikey_change", key.pk), {**KEY_FORM, "rpm": "5"}).status_code == 403


def test_keys_are_revoked_in_bulk(browser: Client, boss: User) -> None:
    made = [keys.create_key(boss, name)[0] for name in ("a", "b", "c")]
    browser.post(url("apikey_changelist"), {"action": "revoke_selected", "_selected_action": [made[0].pk, made[1].pk]})
    assert [key.name for key in APIKey.objects.usable()] == ["c"]


def test_a_user_with_keys_can_be_deleted(browser: Client) -> None:
    alice = User.objects.create_user("alice")
    keys.create_key(alice, "laptop")
    answer = browser.post(reverse("admin:auth_user_delete", args=[alice.pk]), {"post": "yes"})
    assert answer.status_code == 302
    assert not APIKey.objects.exists()


# models


@pytest.mark.usefixtures("folder")
def test_a_saved_model_asks_for_a_reconcile(browser: Client, django_capture_on_commit_callbacks: Captured) -> None:
    with django_capture_on_commit_callbacks() as asked:
        answer = browser.post(url("modelconfig_add"), model_form())
        assert answer.status_code == 302, errors_of(answer)
        model = ModelConfig.objects.get()
        browser.post(url("modelconfig_change", model.pk), model_form(slots=4))
        browser.post(url("modelconfig_delete", model.pk), {"post": "yes"})
    assert len(asked) == 3
    assert not ModelConfig.objects.exists()


@pytest.mark.parametrize(
    ("given", "field", "words"),
    [
        ({"name": "taken"}, "name", "name of an alias already"),
        ({"name": "bad name"}, "name", "Use letters"),
        ({"chat_model_path": "/etc/passwd"}, "chat_model_path", "outside the folders for model files, which are: "),
        ({"chat_model_path": "gone.gguf"}, "chat_model_path", "There is no file gone.gguf"),
        ({"chat_model_path": ""}, "__all__", "Give at least one of chat_model_path"),
        ({"extra_args": '{"host": "::"}'}, "extra_args", "not an allowed setting"),
        ({"extra_args": "[]"}, "extra_args", "object"),
        ({"extra_args": "{"}, "extra_args", "valid JSON"),
        ({"slots": 0}, "slots", "greater than or equal to 1"),
        ({"min_replicas": 2}, "__all__", "min_replicas must not be above"),
        ({"port": 9000, "embedding_model_path": "small.gguf"}, "port", "Two processes cannot have one port"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_bad_model_form_comes_back_with_the_error_at_its_field(
    browser: Client, given: dict[str, Any], field: str, words: str
) -> None:
    other = ModelConfig.objects.create(name="other", chat_model_path="/m/other.gguf")
    ModelAlias.objects.create(name="taken", model=other)
    answer = browser.post(url("modelconfig_add"), model_form(**given))
    assert words in errors_of(answer)[field][0]
    assert ModelConfig.objects.count() == 1


@pytest.mark.usefixtures("folder")
def test_a_model_whose_file_has_gone_can_still_be_disabled(browser: Client) -> None:
    model = ModelConfig.objects.create(name="small", chat_model_path="gone.gguf")
    form = model_form(chat_model_path="gone.gguf")
    del form["enabled"]
    assert browser.post(url("modelconfig_change", model.pk), form).status_code == 302
    model.refresh_from_db()
    assert not model.enabled


def test_a_link_out_of_the_folder_is_refused(browser: Client, folder: Path) -> None:
    (folder.parent / "outside.gguf").write_bytes(b"GGUF")
    (folder / "link.gguf").symlink_to(folder.parent / "outside.gguf")
    answer = browser.post(url("modelconfig_add"), model_form(chat_model_path="link.gguf"))
    assert "outside the folders" in errors_of(answer)["chat_model_path"][0]


def test_the_form_offers_the_files_there_are(browser: Client, folder: Path) -> None:
    assert f'<option value="{folder / "small.gguf"}">' in browser.get(url("modelconfig_add")).content.decode()


def test_an_alias_cannot_hide_a_model(browser: Client) -> None:
    model = ModelConfig.objects.create(name="small", chat_model_path="/m/small.gguf")
    answer = browser.post(url("modelalias_add"), {"name": "small", "model": model.pk})
    assert "name of a model already" in errors_of(answer)["name"][0]


@pytest.mark.parametrize(("action", "before", "after"), [("start", False, True), ("stop", True, False), ("restart", False, True)])
def test_the_models_buttons_work_on_post(
    browser: Client, action: str, before: bool, after: bool, django_capture_on_commit_callbacks: Captured
) -> None:
    model = ModelConfig.objects.create(name="small", chat_model_path="/m/small.gguf", enabled=before)
    here = f"http://testserver{url('modelconfig_changelist')}?q=small"
    with django_capture_on_commit_callbacks() as asked:
        answer = browser.post(
            url(f"modelconfig_{action}", model.pk), CONFIRM, headers={"HX-Request": "true", "HX-Current-URL": here}
        )
    assert answer["HX-Redirect"] == here
    assert len(asked) == 1
    model.refresh_from_db()
    assert model.enabled is after


def test_an_action_does_not_lead_to_a_foreign_page(browser: Client) -> None:
    model = ModelConfig.objects.create(name="small", chat_model_path="/m/small.gguf")
    answer = browser.post(
        url("modelconfig_stop", model.pk), CONFIRM, headers={"HX-Request": "true", "HX-Current-URL": "https://evil.example/"}
    )
    assert answer["HX-Redirect"] == url("modelconfig_change", model.pk)


def test_models_are_stopped_in_bulk(browser: Client) -> None:
    made = [ModelConfig.objects.create(name=name, chat_model_path="/m/x.gguf") for name in ("a", "b", "c")]
    browser.post(url("modelconfig_changelist"), {"action": "stop_selected", "_selected_action": [made[0].pk, made[1].pk]})
    assert [model.name for model in ModelConfig.objects.enabled()] == ["c"]


# instances, nodes, remote servers, users


def instance(state: str) -> Instance:
    model = ModelConfig.objects.create(name="small", chat_model_path="/m/small.gguf")
    node = Node.objects.create(name="here")
    return Instance.objects.create(model=model, model_name="small", node=node, engine="embedded", state=state, failures=4)


def test_a_crash_loop_is_ended_by_restart(browser: Client) -> None:
    crashed = instance("CRASH_LOOP")
    browser.post(url("instance_restart", crashed.pk), CONFIRM)
    crashed.refresh_from_db()
    assert crashed.state == "PENDING"


def test_what_cannot_be_stopped_is_said(browser: Client) -> None:
    stopped = instance("STOPPED")
    answer = browser.post(url("instance_stop", stopped.pk), CONFIRM, follow=True)
    assert "is STOPPED already" in answer.content.decode()
    assert browser.post(url("instance_stop", 999), CONFIRM).status_code == 404


def test_instances_are_stopped_in_bulk(browser: Client) -> None:
    failed = instance("FAILED")
    browser.post(url("instance_changelist"), {"action": "stop_selected", "_selected_action": [failed.pk]})
    failed.refresh_from_db()
    assert failed.state == "STOPPED"


def test_a_node_is_cordoned_and_uncordoned(browser: Client) -> None:
    node = Node.objects.create(name="here")
    browser.post(url("node_cordon", node.pk), CONFIRM)
    assert Node.objects.get().cordoned
    browser.post(url("node_uncordon", node.pk), CONFIRM)
    assert not Node.objects.get().cordoned


def test_a_remote_secret_is_sealed_kept_and_forgotten(browser: Client) -> None:
    form = {
        "name": "away", "kind": "openai", "address": "https://api.example.org/v1", "models": '{"gpt-4o": "gpt-4o"}',
        "weight": "1", "max_in_flight": "4", "enabled": "on",
    }  # fmt: skip
    browser.post(url("remoteserver_add"), {**form, "new_secret": "sk-very-secret"})
    remote = RemoteServer.objects.get()
    assert secret_box.unseal(settings.SECRET_KEY, remote.secret) == "sk-very-secret"
    change = url("remoteserver_change", remote.pk)
    page = browser.get(change).content.decode()
    assert "sk-very-secret" not in page
    assert remote.secret not in page
    browser.post(change, {**form, "weight": "2"})
    remote.refresh_from_db()
    assert (remote.weight, secret_box.unseal(settings.SECRET_KEY, remote.secret)) == (2.0, "sk-very-secret")
    browser.post(change, {**form, "forget_secret": "on"})
    remote.refresh_from_db()
    assert remote.secret == ""


def test_a_remote_address_must_be_a_url(browser: Client) -> None:
    answer = browser.post(url("remoteserver_add"), {"name": "x", "kind": "openai", "address": "api.example.org", "models": "{}"})
    assert "http or https URL" in errors_of(answer)["address"][0]


def test_staff_who_manage_users_cannot_make_themselves_superusers(boss: User) -> None:
    sam = User.objects.create_user("sam", is_staff=True)
    sam.user_permissions.add(*Permission.objects.filter(codename__in=("view_user", "change_user")))
    browser = Client()
    browser.force_login(sam)
    own = reverse("admin:auth_user_change", args=[sam.pk])
    joined = {"date_joined_0": "2026-01-01", "date_joined_1": "00:00:00"}
    browser.post(own, {"username": "sam", "is_active": "on", "is_staff": "on", "is_superuser": "on", **joined})
    sam.refresh_from_db()
    assert not sam.is_superuser
    assert browser.post(reverse("admin:auth_user_change", args=[boss.pk]), {"username": "boss"}).status_code == 403
    assert browser.get(reverse("admin:auth_user_password_change", args=[boss.pk])).status_code == 403


def test_the_sign_in_page_leads_to_the_overview(boss: User) -> None:
    browser = Client()
    assert browser.get("/")["Location"] == "/admin/"
    answer = browser.post("/admin/login/", {"username": "boss", "password": "battery staple"})
    assert answer["Location"] == "/admin/"
