"""Who may use the REST admin API: every kind of caller against every kind of endpoint."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.utils import timezone

from models_app import keys
from models_app.contracts import key_material
from models_app.models import APIKey, Instance, ModelAlias, ModelConfig, Node, RemoteServer

pytestmark = pytest.mark.django_db

LISTS = ("models", "model-aliases", "instances", "jobs", "incidents", "nodes", "remote-servers", "keys", "users", "requests")
ACTIONS = (
    "models/1/start/",
    "models/1/stop/",
    "models/1/restart/",
    "models/1/fit/",
    "instances/1/restart/",
    "instances/1/stop/",
    "keys/1/revoke/",
    "nodes/1/cordon/",
    "nodes/1/uncordon/",
)
WRITES = ("models/", "model-aliases/", "remote-servers/", "keys/")


class Cast:
    """One of each: boss (superuser), sam (staff without permissions), alice (an ordinary user), and rows to act on."""

    def __init__(self) -> None:
        self.boss = User.objects.create_superuser("boss", password="battery staple")
        self.sam = User.objects.create_user("sam", password="horse", is_staff=True)
        self.alice = User.objects.create_user("alice", password="correct")
        node = Node.objects.create(pk=1, name="here")
        model = ModelConfig.objects.create(pk=1, name="small", chat_model_path="/m/small.gguf", enabled=False)
        ModelAlias.objects.create(pk=1, name="tiny", model=model)
        Instance.objects.create(pk=1, model=model, model_name="small", node=node, engine="embedded", state="FAILED")
        RemoteServer.objects.create(pk=1, name="away", address="http://127.0.0.1:9/v1")
        key, self.boss_inference = keys.create_key(self.boss, "chat")
        self.key_id = key.pk
        self.boss_admin = keys.create_key(self.boss, "ops", scopes=["admin"])[1]
        self.sam_admin = keys.create_key(self.sam, "ops", scopes=["admin"])[1]
        self.alice_inference = keys.create_key(self.alice, "chat")[1]

    def client(self, who: str) -> Client:
        client = Client()
        match who:
            case "anonymous":
                pass
            case "boss_session" | "sam_session" | "alice_session":
                client.force_login(getattr(self, who.removesuffix("_session")))
            case _:
                client.defaults["HTTP_AUTHORIZATION"] = f"Bearer {getattr(self, who)}"
        return client

    def path(self, path: str) -> str:
        return "/api/v1/" + path.replace("keys/1/", f"keys/{self.key_id}/")


@pytest.fixture
def cast() -> Cast:
    return Cast()


OUTCOMES = {
    "anonymous": 401,
    "alice_session": 403,
    "alice_inference": 403,
    "boss_inference": 403,
    "sam_session": 403,
    "sam_admin": 403,
    "boss_session": 200,
    "boss_admin": 200,
}


@pytest.mark.parametrize(("who", "status"), OUTCOMES.items())
def test_only_permitted_staff_may_read(cast: Cast, who: str, status: int) -> None:
    client = cast.client(who)
    for resource in LISTS:
        assert client.get(cast.path(f"{resource}/")).status_code == status, resource


@pytest.mark.parametrize("who", [who for who, status in OUTCOMES.items() if status != 200])
def test_nobody_else_may_act_or_write(cast: Cast, who: str) -> None:
    client = cast.client(who)
    for path in (*ACTIONS, *WRITES):
        answer = client.post(cast.path(path), {}, content_type="application/json")
        assert answer.status_code == OUTCOMES[who], path
    for resource in ("models", "model-aliases", "remote-servers", "nodes", "keys"):
        row = cast.path(f"{resource}/1/")
        assert client.patch(row, {}, content_type="application/json").status_code == OUTCOMES[who], resource
        assert client.delete(row).status_code in (OUTCOMES[who], 405), resource
    assert ModelConfig.objects.get().enabled is False
    assert not APIKey.objects.filter(revoked_at__isnull=False).exists()


@pytest.mark.parametrize("who", ["boss_session", "boss_admin"])
def test_a_superuser_and_their_admin_key_may_act(cast: Cast, who: str) -> None:
    client = cast.client(who)
    assert client.post(cast.path("models/1/start/")).status_code == 202
    assert client.post(cast.path("instances/1/restart/")).status_code == 202
    assert client.post(cast.path("keys/1/revoke/")).status_code == 200
    assert ModelConfig.objects.get().enabled is True
    assert APIKey.objects.get(pk=cast.key_id).revoked_at is not None


@pytest.mark.parametrize("who", ["sam_session", "sam_admin"])
def test_staff_may_do_what_their_permissions_say(cast: Cast, who: str) -> None:
    cast.sam.user_permissions.add(*Permission.objects.filter(codename__in=("view_modelconfig", "change_modelconfig")))
    client = cast.client(who)
    assert client.get(cast.path("models/")).status_code == 200
    assert client.post(cast.path("models/1/start/")).status_code == 202
    assert client.post(cast.path("models/"), {"name": "new"}, content_type="application/json").status_code == 403
    assert client.delete(cast.path("models/1/")).status_code == 403
    assert client.get(cast.path("keys/")).status_code == 403


def test_a_missing_key_is_challenged(cast: Cast) -> None:
    answer = cast.client("anonymous").get(cast.path("models/"))
    assert answer.status_code == 401
    assert answer["WWW-Authenticate"] == 'Bearer realm="assistant"'


@pytest.mark.parametrize("text", ["", "nonsense", key_material.generate().text])
def test_an_unknown_key_is_401_and_is_not_echoed(cast: Cast, text: str) -> None:
    answer = Client(headers={"Authorization": f"Bearer {text}"}).get(cast.path("models/"))
    assert answer.status_code == 401
    assert answer["WWW-Authenticate"] == 'Bearer realm="assistant"'
    assert not text or text not in answer.content.decode()


def test_a_bad_key_is_refused_even_beside_a_good_session(cast: Cast) -> None:
    client = cast.client("boss_session")
    assert client.get(cast.path("models/"), headers={"Authorization": "Bearer nonsense"}).status_code == 401


def test_a_key_stops_working_when_it_or_its_user_does(cast: Cast) -> None:
    client = cast.client("boss_admin")
    key = APIKey.objects.get(user=cast.boss, name="ops")
    APIKey.objects.filter(pk=key.pk).update(expires_at=timezone.now() - timedelta(seconds=1))
    assert client.get(cast.path("models/")).status_code == 401
    APIKey.objects.filter(pk=key.pk).update(expires_at=None)
    assert client.get(cast.path("models/")).status_code == 200
    User.objects.filter(pk=cast.boss.pk).update(is_active=False)
    assert client.get(cast.path("models/")).status_code == 401
    User.objects.filter(pk=cast.boss.pk).update(is_active=True)
    keys.revoke_key(key)
    assert client.get(cast.path("models/")).status_code == 401


def test_an_admin_key_loses_its_power_with_its_users_staff_status(cast: Cast) -> None:
    User.objects.filter(pk=cast.boss.pk).update(is_staff=False)
    assert cast.client("boss_admin").get(cast.path("models/")).status_code == 403


def test_a_session_needs_the_csrf_token_and_a_key_does_not(cast: Cast) -> None:
    browser = Client(enforce_csrf_checks=True)
    browser.force_login(cast.boss)
    assert browser.post(cast.path("models/1/start/")).status_code == 403
    program = Client(enforce_csrf_checks=True, headers={"Authorization": f"Bearer {cast.boss_admin}"})
    assert program.post(cast.path("models/1/start/")).status_code == 202


def test_use_of_a_key_is_noted(cast: Cast) -> None:
    cast.client("boss_admin").get(cast.path("models/"))
    assert APIKey.objects.get(user=cast.boss, name="ops").last_used_at is not None
    assert APIKey.objects.get(user=cast.boss, name="chat").last_used_at is None


def test_the_schema_is_for_staff_and_the_docs_page_asks_to_sign_in(cast: Cast) -> None:
    assert cast.client("anonymous").get(cast.path("schema/")).status_code == 401
    assert cast.client("alice_inference").get(cast.path("schema/")).status_code == 403
    assert cast.client("boss_admin").get(cast.path("schema/")).status_code == 200
    assert cast.client("anonymous").get(cast.path("docs/"))["Location"] == "/admin/login/?next=/api/v1/docs/"
    page = cast.client("boss_session").get(cast.path("docs/"))
    assert page.status_code == 200
    assert "https://" not in page.content.decode()
