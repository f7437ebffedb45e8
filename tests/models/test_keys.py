"""Keys: made once, described clearly when refused, printed alone by the command."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from io import StringIO
from typing import ClassVar

import pytest
from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.core.management import CommandError, call_command
from django.db import connection
from django.utils import timezone

from models_app import keys
from models_app.contracts import key_material
from models_app.management.commands.create_api_key import wait_until_seen
from models_app.models import APIKey, ModelAlias, ModelConfig, RemoteServer

pytestmark = pytest.mark.django_db


@pytest.fixture
def alice() -> User:
    return User.objects.create_user("alice", password="correct horse")


@pytest.fixture
def boss() -> User:
    return User.objects.create_superuser("boss", password="battery staple")


class Gate(http.server.BaseHTTPRequestHandler):
    """A gateway that learns of the key after so many refusals."""

    refusals = 0
    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        type(self).asked.append(self.headers.get("Authorization"))
        status = 401 if len(type(self).asked) <= type(self).refusals else 200
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def gate() -> Iterator[tuple[type[Gate], tuple[str, int]]]:
    handler = type("FreshGate", (Gate,), {"asked": [], "refusals": 0})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler, ("127.0.0.1", server.server_port)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def nobody_listens(settings: object) -> None:
    """A loopback port that was free a moment ago."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Gate)
    settings.ASSISTANT_HTTP_ADDR = ("127.0.0.1", server.server_port)  # type: ignore[attr-defined]
    server.server_close()


def test_the_text_is_returned_once_and_never_stored(alice: User) -> None:
    key, text = keys.create_key(alice, "laptop")
    assert key_material.well_formed(text)
    assert key.digest == key_material.digest(text)
    assert key.scopes == ["inference"]
    secret = text[-(key_material.SECRET_LENGTH + key_material.CHECKSUM_LENGTH) :]
    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM models_app_apikey WHERE id = %s", [key.pk])
        assert secret not in repr(cursor.fetchall())
    assert secret not in f"{key!r} {key} {vars(key)}"


def test_limits_are_kept(alice: User) -> None:
    until = timezone.now() + timedelta(days=1)
    key, _ = keys.create_key(alice, "ci", rpm=60, tpm=1000, parallel=2, expires_at=until, priority="bulk", private=True)
    key.refresh_from_db()
    assert (key.rpm, key.tpm, key.parallel, key.expires_at, key.priority, key.private) == (60, 1000, 2, until, "bulk", True)


def test_a_key_may_name_models_aliases_and_remote_models(alice: User) -> None:
    model = ModelConfig.objects.create(name="small", chat_model_path="/m/small.gguf")
    ModelAlias.objects.create(name="gpt-4o", model=model)
    RemoteServer.objects.create(name="away", address="http://127.0.0.1:9/v1", models={"large": "vendor/large"})
    key, _ = keys.create_key(alice, "three", models=["small", "gpt-4o", "large"])
    assert key.models == ["small", "gpt-4o", "large"]


def test_an_unknown_model_is_refused_by_name_and_the_known_ones_are_listed(alice: User) -> None:
    ModelConfig.objects.create(name="small", chat_model_path="/m/small.gguf")
    with pytest.raises(ValidationError) as caught:
        keys.create_key(alice, "typo", models=["smal"])
    assert caught.value.message_dict == {"models": ["Known models: small. Not known: smal."]}
    assert not APIKey.objects.exists()


@pytest.mark.parametrize("scopes", [[], ["root"], ["inference", "root"]])
def test_unknown_or_no_scopes_are_refused(alice: User, scopes: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        keys.create_key(alice, "odd", scopes=scopes)
    assert "Give one or more of: inference, admin." in caught.value.message_dict["scopes"][0]


def test_an_admin_key_needs_a_user_with_staff_status(alice: User) -> None:
    with pytest.raises(ValidationError, match="staff status"):
        keys.create_key(alice, "power", scopes=["admin"])


def test_only_a_superuser_makes_an_admin_key_for_somebody_else(boss: User, alice: User) -> None:
    alice.is_staff = True
    alice.save()
    with pytest.raises(ValidationError, match="Only a superuser"):
        keys.create_key(boss, "power", scopes=["admin"], actor=alice)
    assert keys.create_key(alice, "own", scopes=["admin"], actor=alice)[0].pk
    assert keys.create_key(alice, "given", scopes=["admin"], actor=boss)[0].pk


def test_a_name_is_free_again_once_its_key_is_revoked(alice: User) -> None:
    first, _ = keys.create_key(alice, "laptop")
    with pytest.raises(ValidationError) as caught:
        keys.create_key(alice, "laptop")
    assert "already has a key named “laptop”" in caught.value.message_dict["name"][0]
    assert keys.revoke_key(first)
    second, _ = keys.create_key(alice, "laptop")
    assert second.pk != first.pk


def test_a_deactivated_user_gets_no_key(alice: User) -> None:
    alice.is_active = False
    with pytest.raises(ValidationError, match="deactivated"):
        keys.create_key(alice, "late")


def test_a_key_cannot_be_born_expired(alice: User) -> None:
    with pytest.raises(ValidationError, match="past"):
        keys.create_key(alice, "old", expires_at=timezone.now() - timedelta(seconds=1))


def test_zero_is_no_limit_one_can_set(alice: User) -> None:
    with pytest.raises(ValidationError) as caught:
        keys.create_key(alice, "zero", rpm=0)
    assert list(caught.value.message_dict) == ["rpm"]


def test_revoking_twice_keeps_the_first_time(alice: User) -> None:
    key, _ = keys.create_key(alice, "laptop")
    assert keys.revoke_key(key)
    when = key.revoked_at
    assert not keys.revoke_key(key)
    assert key.revoked_at == when
    assert not APIKey.objects.usable().exists()


@pytest.mark.usefixtures("nobody_listens")
def test_the_command_prints_the_key_alone(alice: User) -> None:
    out, err = StringIO(), StringIO()
    call_command("create_api_key", "--user", "alice", "--name", "laptop", "--rpm", "30", stdout=out, stderr=err)
    text = out.getvalue().strip()
    assert out.getvalue() == text + "\n"
    assert key_material.well_formed(text)
    assert err.getvalue() == ""
    assert APIKey.objects.get(digest=key_material.digest(text)).rpm == 30


@pytest.mark.usefixtures("nobody_listens")
def test_the_command_adds_the_admin_scope_to_inference_and_speaks_json(boss: User) -> None:
    out = StringIO()
    call_command("create_api_key", "--user", "boss", "--name", "ops", "--scope", "admin", "--json", stdout=out)
    told = json.loads(out.getvalue())
    key = APIKey.objects.get(pk=told["id"])
    assert key.digest == key_material.digest(told["key"])
    assert told["scopes"] == key.scopes == ["inference", "admin"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--user", "nemo", "--name", "x"], "There is no user “nemo”.*createsuperuser"),
        (["--user", "alice", "--name", "x", "--model", "none"], "--model: .*Not known: none"),
        (["--user", "alice", "--name", "x", "--scope", "admin"], "--scope: .*staff"),
        (["--user", "alice", "--name", "x", "--rpm", "0"], "--rpm: "),
        (["--user", "alice", "--name", ""], "--name: "),
    ],
)
@pytest.mark.usefixtures("alice", "nobody_listens")
def test_the_command_says_what_is_wrong_with_which_option(arguments: list[str], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        call_command("create_api_key", *arguments)
    assert not APIKey.objects.exists()


@pytest.mark.usefixtures("nobody_listens")
def test_the_command_names_a_key_that_is_there_already(alice: User) -> None:
    keys.create_key(alice, "laptop")
    with pytest.raises(CommandError, match="already has a key named “laptop”"):
        call_command("create_api_key", "--user", "alice", "--name", "laptop")


def test_the_command_waits_until_the_gateway_knows_the_key(gate: tuple[type[Gate], tuple[str, int]]) -> None:
    handler, address = gate
    handler.refusals = 2
    assert wait_until_seen("ast_x", address)
    assert handler.asked == ["Bearer ast_x"] * 3
