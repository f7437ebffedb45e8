"""What the REST admin API says to input that nobody sends on purpose: an error as JSON, never a failure of ours."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import OperationalError
from django.test import Client

from models_app import keys
from models_app.api import errors
from models_app.models import ModelConfig
from tests.fakes import gguf_files

pytestmark = pytest.mark.django_db


@pytest.fixture
def client() -> Client:
    """A program of a superuser's."""
    boss = User.objects.create_superuser("boss", password="battery staple")
    return Client(headers={"Authorization": f"Bearer {keys.create_key(boss, 'ops', scopes=['admin'])[1]}"})


@pytest.mark.parametrize(
    "body",
    [
        r'{"name": "small", "engine": "\ud800"}',
        r'{"name": "small", "extra_args": {"\ud800": 1}}',
        '{"name": "small", "extra_args": {"rope_freq_base": 1e400}}',
        '{"name": "small", "slots": NaN}',
        "[" * 20_000,
        '{"a":' * 20_000,
        "\xff",
    ],
)
def test_json_that_cannot_be_answered_or_stored_is_refused_as_such(client: Client, body: str) -> None:
    answer = client.post("/api/v1/models/", body.encode("latin-1"), content_type="application/json")
    assert answer.status_code == 400, answer.content[:300]
    assert "JSON" in answer.json()["detail"]
    assert not ModelConfig.objects.exists()


@pytest.mark.parametrize("user", [r'"\ud800"', "1e400", '"a\\u0000b"', "9" * 30, '"²"', "true", "[]"])
def test_a_user_that_cannot_exist_is_an_error_of_the_caller(client: Client, user: str) -> None:
    answer = client.post("/api/v1/keys/", f'{{"name": "k", "user": {user}}}', content_type="application/json")
    assert answer.status_code == 400, answer.content[:300]


@pytest.mark.parametrize("query", ["keys/?user=999999999999999999999999", "requests/?status=999999999999999999999999"])
def test_a_filter_beyond_what_the_database_counts_is_named(client: Client, query: str) -> None:
    answer = client.get(f"/api/v1/{query}")
    assert answer.status_code == 400
    assert list(answer.json()) == [query.partition("?")[2].partition("=")[0]]


@pytest.mark.parametrize(
    "extra",
    [
        {"sampling.temp": 10**400},
        {"sampling.temp": -(10**400)},
        {"tensor_split": [1, 10**400]},
        {"lora": [{"path": "a.gguf", "scale": 10**400}]},
        {"sampling.temp": "9" * 9000},
        {"9" * 9000: 1},
    ],
)
@pytest.mark.parametrize("engine", ["embedded", "llama-server"])
def test_a_setting_out_of_all_bounds_is_refused_and_not_repeated_whole(
    client: Client, extra: dict[str, Any], engine: str, tmp_path: Path, settings: Any
) -> None:
    settings.ASSISTANT_MODEL_DIRS = [tmp_path]
    gguf_files.llama(tmp_path / "a.gguf")
    body = json.dumps({"name": "small", "engine": engine, "chat_model_path": "a.gguf", "extra_args": extra})
    answer = client.post("/api/v1/models/", body, content_type="application/json")
    assert answer.status_code == 400
    (said,) = answer.json()["extra_args"]
    assert "9" * 100 not in said
    assert "0" * 100 not in said


@pytest.mark.parametrize("setting", ["ctx_sizes", "context", "", "revision"])
def test_a_misspelt_setting_is_not_judged_as_if_it_were_understood(
    client: Client, setting: str, tmp_path: Path, settings: Any
) -> None:
    settings.ASSISTANT_MODEL_DIRS = [tmp_path]
    gguf_files.llama(tmp_path / "a.gguf")
    model = ModelConfig.objects.create(name="small", chat_model_path="a.gguf")
    body = {"ctx_size": 512, setting: 4096}
    answer = client.post(f"/api/v1/models/{model.pk}/fit/", json.dumps(body), content_type="application/json")
    assert (answer.status_code, list(answer.json())) == (400, [setting])


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "nowhere.gguf"])
@pytest.mark.parametrize("setting", ["draft_model", "lora"])
def test_a_further_file_must_be_where_model_files_are_when_it_is_saved(
    client: Client, path: str, setting: str, tmp_path: Path, settings: Any
) -> None:
    settings.ASSISTANT_MODEL_DIRS = [tmp_path]
    gguf_files.llama(tmp_path / "a.gguf")
    extra = {setting: [{"path": path}] if setting == "lora" else path}
    body = json.dumps({"name": "small", "chat_model_path": "a.gguf", "extra_args": extra})
    answer = client.post("/api/v1/models/", body, content_type="application/json")
    assert (answer.status_code, list(answer.json())) == (400, ["extra_args"])
    assert str(tmp_path) in answer.json()["extra_args"][0]


@pytest.mark.parametrize("path", ["m" * 300, "m" * 300 + "/x.gguf", "/" + "m/" * 500])
def test_a_path_too_long_for_the_system_is_an_error_at_its_field(
    client: Client, path: str, tmp_path: Path, settings: Any
) -> None:
    settings.ASSISTANT_MODEL_DIRS = [tmp_path]
    body = json.dumps({"name": "small", "chat_model_path": path})
    answer = client.post("/api/v1/models/", body, content_type="application/json")
    assert answer.status_code == 400
    assert list(answer.json()) == ["chat_model_path"]


def test_a_database_that_is_locked_is_said_to_be_busy() -> None:
    error = OperationalError(sqlite3.OperationalError("database is locked"))
    answer = errors.handle(error, {})
    assert answer is not None
    assert (answer.status_code, answer.data["detail"].code) == (503, "unavailable")
