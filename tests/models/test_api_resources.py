"""What the REST admin API does: resources, actions, errors that name the field, lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connection
from django.test import Client
from django.utils import timezone

from models_app import keys
from models_app.contracts import key_material, secret_box
from models_app.models import APIKey, Instance, ModelAlias, ModelConfig, Node, RemoteServer, UsageEvent
from tests.fakes import gguf_files

pytestmark = pytest.mark.django_db

Captured = Callable[..., AbstractContextManager[list[Callable[[], Any]]]]


class Api:
    """The API as an administrator's program sees it."""

    def __init__(self, text: str) -> None:
        self._client = Client(headers={"Authorization": f"Bearer {text}"})

    def __call__(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        answer = self._client.generic(
            method, f"/api/v1/{path}", "" if body is None else json.dumps(body), content_type="application/json"
        )
        return answer.status_code, json.loads(answer.content) if answer.content else None


@pytest.fixture
def boss() -> User:
    return User.objects.create_superuser("boss", password="battery staple")


@pytest.fixture
def api(boss: User) -> Api:
    return Api(keys.create_key(boss, "ops", scopes=["admin"])[1])


@pytest.fixture
def folder(tmp_path: Path, settings: Any) -> Path:
    """The one folder model files may lie in, with a model and a web page saved as one."""
    models = tmp_path / "models"
    models.mkdir()
    gguf_files.llama(models / "small.gguf")
    (models / "page.gguf").write_bytes(b"<html>")
    settings.ASSISTANT_MODEL_DIRS = [models]
    return models


def model_row(**given: Any) -> ModelConfig:
    return ModelConfig.objects.create(**{"name": "small", "chat_model_path": "/m/small.gguf", **given})


def test_a_model_is_made_changed_and_deleted(api: Api, folder: Path, django_capture_on_commit_callbacks: Captured) -> None:
    with django_capture_on_commit_callbacks() as asked:
        status, made = api("POST", "models/", {"name": "small", "chat_model_path": str(folder / "small.gguf")})
        assert status == 201, made
        assert (made["engine"], made["slots"], made["enabled"], made["state"]) == ("embedded", 2, True, "loading")
        status, changed = api("PATCH", f"models/{made['id']}/", {"slots": 4, "extra_args": {"warmup": False}})
        assert (status, changed["slots"], changed["extra_args"]) == (200, 4, {"warmup": False})
        status, _ = api("DELETE", f"models/{made['id']}/")
        assert status == 204
    assert len(asked) == 3
    assert not ModelConfig.objects.exists()


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"chat_model_path": "small.gguf"}, "name", "required"),
        ({"name": "bad name", "chat_model_path": "small.gguf"}, "name", "Use letters"),
        ({"name": "taken", "chat_model_path": "small.gguf"}, "name", "alias already"),
        ({"name": "m", "chat_model_path": "/etc/passwd"}, "chat_model_path", "outside the folders"),
        ({"name": "m", "chat_model_path": "none.gguf"}, "chat_model_path", "There is no file none.gguf"),
        ({"name": "m"}, "non_field_errors", "at least one of chat_model_path"),
        ({"name": "m", "chat_model_path": "small.gguf", "slots": 0}, "slots", "greater than or equal to 1"),
        ({"name": "m", "chat_model_path": "small.gguf", "engine": "magic"}, "engine", "not a valid choice"),
        ({"name": "m", "chat_model_path": "small.gguf", "extra_args": [1]}, "extra_args", "object"),
        (
            {"name": "m", "chat_model_path": "small.gguf", "extra_args": {"host": "0.0.0.0"}},
            "extra_args",
            "not an allowed setting",
        ),
        ({"name": "m", "chat_model_path": "small.gguf", "prompt_template": "nope"}, "prompt_template", "not built in"),
        ({"name": "m", "chat_model_path": "page.gguf"}, "chat_model_path", "saved web answer"),
        ({"name": "m", "chat_model_path": "small.gguf", "min_replicas": 3}, "non_field_errors", "min_replicas must not"),
        ({"name": "m", "chat_model_path": "small.gguf", "port": 80}, "port", "1024"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_bad_model_is_refused_by_field(api: Api, body: dict[str, Any], field: str, words: str) -> None:
    ModelAlias.objects.create(name="taken", model=model_row(name="other"))
    status, errors = api("POST", "models/", body)
    assert status == 400
    assert list(errors) == [field]
    assert words in errors[field][0]
    assert ModelConfig.objects.count() == 1


def test_malformed_json_and_other_media_types_are_refused(api: Api, boss: User) -> None:
    client = Client()
    client.force_login(boss)
    assert client.post("/api/v1/models/", "{", content_type="application/json").status_code == 400
    assert client.post("/api/v1/models/", {"name": "x"}).status_code == 415


def test_start_stop_and_restart_change_what_is_wanted(api: Api, django_capture_on_commit_callbacks: Captured) -> None:
    model = model_row(enabled=False)
    with django_capture_on_commit_callbacks() as asked:
        status, told = api("POST", f"models/{model.pk}/start/")
        assert (status, told["enabled"]) == (202, True)
        status, told = api("POST", f"models/{model.pk}/stop/")
        assert (status, told["enabled"]) == (202, False)
        status, told = api("POST", f"models/{model.pk}/restart/")
        assert (status, told["enabled"]) == (202, True)
    assert len(asked) == 3
    assert api("GET", f"models/{model.pk}/start/")[0] == 405
    assert api("POST", "models/999/start/")[0] == 404


def test_a_model_says_how_it_is_doing(api: Api) -> None:
    model = model_row(min_replicas=2, max_replicas=2)
    node = Node.objects.create(name="here")
    common = {"model": model, "model_name": model.name, "node": node, "engine": "embedded"}
    Instance.objects.create(**common, state="READY", port=4000, pid=7)
    Instance.objects.create(**common, state="FAILED", exit_reason="It was killed.")
    Instance.objects.create(**common, state="STOPPED", exit_reason="Long ago.")
    ModelAlias.objects.create(name="tiny", model=model)
    told = api("GET", f"models/{model.pk}/")[1]
    assert (told["state"], told["ready_replicas"], told["reason"]) == ("degraded", 1, "It was killed.")
    assert told["aliases"] == ["tiny"]


def test_an_alias_takes_its_model_by_id_or_name(api: Api) -> None:
    model = model_row()
    status, by_name = api("POST", "model-aliases/", {"name": "tiny", "model": "small"})
    assert (status, by_name["model"], by_name["model_name"]) == (201, model.pk, "small")
    assert api("POST", "model-aliases/", {"name": "mini", "model": model.pk})[0] == 201
    assert api("POST", "model-aliases/", {"name": "x", "model": "nope"}) == (400, {"model": ["There is none called “nope”."]})
    status, errors = api("POST", "model-aliases/", {"name": "small", "model": model.pk})
    assert (status, list(errors)) == (400, ["name"])


def test_instances_are_read_and_operated_but_not_written(api: Api) -> None:
    node = Node.objects.create(name="here")
    crashed = Instance.objects.create(
        model=model_row(), model_name="small", node=node, engine="embedded", state="CRASH_LOOP", failures=5, exit_code=1,
        engine_secret="sealed-secret",
    )  # fmt: skip
    status, told = api("GET", f"instances/{crashed.pk}/")
    assert (status, told["state"], told["exit_code"], told["node_name"]) == (200, "CRASH_LOOP", 1, "here")
    assert "sealed-secret" not in json.dumps(told)
    assert api("PATCH", f"instances/{crashed.pk}/", {"state": "READY"})[0] == 405
    assert api("POST", "instances/", {})[0] == 405
    status, told = api("POST", f"instances/{crashed.pk}/restart/")
    assert (status, told["state"]) == (202, "PENDING")
    status, told = api("POST", f"instances/{crashed.pk}/stop/")
    assert (status, told["state"]) == (202, "STOPPED")
    status, told = api("POST", f"instances/{crashed.pk}/stop/")
    assert status == 409
    assert "STOPPED" in told["detail"]


def test_a_remote_servers_secret_goes_in_and_never_comes_out(api: Api) -> None:
    body = {"name": "away", "address": "https://api.example.org/v1", "models": {"gpt-4o": "gpt-4o"}, "secret": "sk-very-secret"}
    status, made = api("POST", "remote-servers/", body)
    assert (status, made["has_secret"]) == (201, True)
    assert "secret" not in made
    row = RemoteServer.objects.get()
    assert "sk-very-secret" not in row.secret
    assert secret_box.unseal(settings.SECRET_KEY, row.secret) == "sk-very-secret"
    assert api("PATCH", f"remote-servers/{row.pk}/", {"weight": 2.5})[1]["has_secret"] is True
    assert "sk-very-secret" not in json.dumps(api("GET", "remote-servers/"))
    assert api("PATCH", f"remote-servers/{row.pk}/", {"secret": ""})[1]["has_secret"] is False


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"address": "ftp://x/v1"}, "address"),
        ({"address": "https://api.example.org"}, "address"),
        ({"address": "https://user:pw@api.example.org/v1"}, "address"),
        ({"address": "host:1", "kind": "openai"}, "address"),
        ({"address": "https://x/v1", "kind": "assistant"}, "address"),
        ({"models": ["x"]}, "models"),
        ({"models": {"bad name": "x"}}, "models"),
        ({"models": {"x": 1}}, "models"),
        ({"models": {"x": "a\0b"}}, "models"),
        ({"weight": -1}, "weight"),
    ],
)
def test_a_bad_remote_server_is_refused_by_field(api: Api, body: dict[str, Any], field: str) -> None:
    status, errors = api("POST", "remote-servers/", {"name": "away", "address": "https://api.example.org/v1", **body})
    assert (status, list(errors)) == (400, [field])


def test_a_keys_text_is_in_one_answer_and_nowhere_else(api: Api, boss: User) -> None:
    model_row()
    status, made = api("POST", "keys/", {"user": "boss", "name": "laptop", "models": ["small"], "rpm": 60})
    assert status == 201, made
    text = made["key"]
    assert key_material.well_formed(text)
    assert (made["user"], made["username"], made["scopes"], made["status"]) == (boss.pk, "boss", ["inference"], "active")
    secret = text[len("ast_") + key_material.PUBLIC_ID_LENGTH + 1 :]
    assert secret not in json.dumps([api("GET", "keys/"), api("GET", f"keys/{made['id']}/")])
    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM models_app_apikey")
        assert secret not in repr(cursor.fetchall())


def test_the_answer_with_a_key_is_not_to_be_stored(api: Api, boss: User) -> None:
    client = Client()
    client.force_login(boss)
    answer = client.post("/api/v1/keys/", {"user": boss.pk, "name": "laptop"}, content_type="application/json")
    assert (answer.status_code, answer["Cache-Control"]) == (201, "no-store")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "x"}, "user"),
        ({"name": "x", "user": "nemo"}, "user"),
        ({"name": "x", "user": "gone"}, "user"),
        ({"user": "boss"}, "name"),
        ({"name": "ops", "user": "boss"}, "name"),
        ({"name": "x", "user": "boss", "models": ["none"]}, "models"),
        ({"name": "x", "user": "boss", "models": "small"}, "models"),
        ({"name": "x", "user": "boss", "scopes": ["root"]}, "scopes"),
        ({"name": "x", "user": "alice", "scopes": ["admin"]}, "scopes"),
        ({"name": "x", "user": "boss", "rpm": 0}, "rpm"),
        ({"name": "x", "user": "boss", "expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
    ],
)
def test_a_bad_key_is_refused_by_field(api: Api, body: dict[str, Any], field: str) -> None:
    User.objects.create_user("alice")
    User.objects.create_user("gone", is_active=False)
    status, errors = api("POST", "keys/", body)
    assert (status, list(errors)) == (400, [field])
    assert APIKey.objects.count() == 1


def test_limits_are_changed_and_the_owner_is_not(api: Api, boss: User) -> None:
    alice = User.objects.create_user("alice")
    key, _ = keys.create_key(alice, "laptop", models=[])
    status, told = api("PATCH", f"keys/{key.pk}/", {"rpm": 5, "parallel": 2, "user": boss.pk})
    assert (status, told["rpm"], told["parallel"], told["username"]) == (200, 5, 2, "alice")
    assert api("PATCH", f"keys/{key.pk}/", {"scopes": ["admin"]})[1]["scopes"]
    assert api("DELETE", f"keys/{key.pk}/")[0] == 405


def test_a_revoked_key_stays_revoked_and_unchanged(api: Api, boss: User) -> None:
    key, text = keys.create_key(boss, "laptop")
    status, told = api("POST", f"keys/{key.pk}/revoke/")
    assert (status, told["status"]) == (200, "revoked")
    assert api("POST", f"keys/{key.pk}/revoke/")[1]["revoked_at"] == told["revoked_at"]
    assert api("PATCH", f"keys/{key.pk}/", {"rpm": 5})[0] == 400
    assert text not in json.dumps(told)


def test_lists_are_filtered_ordered_and_paged(api: Api) -> None:
    for number in range(5):
        model_row(name=f"m{number}", enabled=number % 2 == 0)
    status, told = api("GET", "models/?enabled=true&ordering=-name&page_size=2")
    assert (status, told["count"], [row["name"] for row in told["results"]]) == (200, 3, ["m4", "m2"])
    assert "page=2" in told["next"]
    assert api("GET", "models/?enabled=perhaps")[0] == 400
    assert api("GET", "keys/?user=abc")[0] == 400
    assert api("GET", "models/?page=99")[0] == 404


def test_requests_are_listed_newest_first_by_cursor(api: Api, boss: User) -> None:
    now = timezone.now()
    UsageEvent.objects.bulk_create(
        UsageEvent(
            request_id=f"r{number}", started_at=now - timedelta(minutes=number), user=boss, model_name="a" if number % 2 else "b",
            endpoint="/v1/chat/completions", status=200, end_reason="stop",
        )
        for number in range(6)
    )  # fmt: skip
    status, told = api("GET", "requests/?page_size=2&model_name=a")
    assert (status, [row["request_id"] for row in told["results"]]) == (200, ["r1", "r3"])
    assert "count" not in told
    assert told["results"][0]["prompt_tokens"] is None
    cursor = told["next"].split("/api/v1/")[1]
    assert [row["request_id"] for row in api("GET", cursor)[1]["results"]] == ["r5"]
    since = (now - timedelta(minutes=2, seconds=1)).isoformat().replace("+", "%2B")
    assert len(api("GET", f"requests/?since={since}")[1]["results"]) == 3
    assert api("POST", "requests/", {})[0] == 405


def test_users_are_listed_without_their_passwords(api: Api) -> None:
    status, told = api("GET", "users/?username=boss")
    assert (status, told["count"]) == (200, 1)
    assert "password" not in told["results"][0]
    assert api("POST", "users/", {"username": "x"})[0] == 405


def test_the_schema_is_valid_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    call_command("spectacular", "--fail-on-warn", "--validate", "--format", "openapi-json")
    schema = json.loads(capsys.readouterr().out)
    for resource in ("models", "instances", "jobs", "incidents", "nodes", "remote-servers", "keys", "users", "requests"):
        assert f"/api/v1/{resource}/" in schema["paths"]
    assert "post" in schema["paths"]["/api/v1/models/{id}/start/"]
    assert "secret" not in schema["components"]["schemas"]["RemoteServer"]["properties"]
    assert "key" not in schema["components"]["schemas"]["Key"]["properties"]
    assert "adminKey" in schema["components"]["securitySchemes"]


@pytest.mark.parametrize("resource", ["models", "model-aliases", "instances", "keys", "remote-servers"])
def test_a_list_of_a_hundred_costs_few_queries(
    api: Api, boss: User, resource: str, django_assert_max_num_queries: Callable[[int], AbstractContextManager[None]]
) -> None:
    node = Node.objects.create(name="here")
    for number in range(100):
        model = model_row(name=f"m{number}")
        ModelAlias.objects.create(name=f"a{number}", model=model)
        Instance.objects.create(model=model, model_name=model.name, node=node, engine="embedded")
        RemoteServer.objects.create(name=f"r{number}", address="https://x/v1")
        APIKey.objects.create(user=boss, name=f"k{number}", public_id=f"{number:010}", digest=f"{number:064}")
    with django_assert_max_num_queries(7):
        status, told = api("GET", f"{resource}/")
    assert (status, len(told["results"])) == (200, 100)
