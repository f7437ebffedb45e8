"""Rules that the database itself keeps, and what the forms and the API say of them."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.utils import timezone

from models_app.models import APIKey, Instance, ModelConfig, Node, RemoteServer, Revision, State

pytestmark = pytest.mark.django_db


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"chat_model_path": ""}, "Give at least one of"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas must not be above max_replicas"),
        ({"port": 9000, "max_replicas": 2}, "A fixed port needs max_replicas 1"),
        ({"slots": 0}, "slots"),
        ({"ctx_size": 8}, "ctx_size"),
        ({"name": "no spaces please"}, "Use letters, digits"),
        ({"engine": "steam"}, "steam"),
    ],
)
def test_a_wrong_model_is_refused_by_the_form_with_a_reason(fields: dict[str, Any], says: str) -> None:
    model = ModelConfig(**{"name": "m", "chat_model_path": "/m.gguf", **fields})
    with pytest.raises(ValidationError) as caught:
        model.full_clean()
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [{"chat_model_path": ""}, {"min_replicas": 3}, {"port": 9000, "max_replicas": 2}, {"slots": 0}, {"ctx_size": 8}],
)
def test_a_wrong_model_is_refused_by_the_database(fields: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError), transaction.atomic():
        ModelConfig.objects.create(**{"name": "m", "chat_model_path": "/m.gguf", **fields})


def test_two_models_cannot_have_the_same_fixed_port() -> None:
    ModelConfig.objects.create(name="a", chat_model_path="/m.gguf", port=9000)
    with pytest.raises(IntegrityError), transaction.atomic():
        ModelConfig.objects.create(name="b", chat_model_path="/m.gguf", port=9000)


def instance(node: Node, **fields: Any) -> Instance:
    return Instance.objects.create(**{"model_name": "m", "node": node, "engine": "embedded", **fields})


def test_a_port_belongs_to_one_live_process_of_a_node() -> None:
    node = Node.objects.create(name="n")
    instance(node, state=State.READY, port=20000, pid=1)
    instance(node, state=State.STOPPED, port=20000, pid=2)  # history may repeat
    instance(Node.objects.create(name="other"), state=State.STARTING, port=20000, pid=3)
    with pytest.raises(IntegrityError), transaction.atomic():
        instance(node, state=State.STARTING, port=20000, pid=4)


@pytest.mark.parametrize("fields", [{"state": "SLEEPING"}, {"state": State.READY}])
def test_an_instance_state_must_be_known_and_ready_needs_a_process(fields: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError), transaction.atomic():
        instance(Node.objects.create(name="n"), **fields)


def test_a_key_name_is_free_again_after_revocation() -> None:
    user = User.objects.create_user("alice")
    APIKey.objects.create(user=user, name="laptop", public_id="1" * 10, digest="1" * 64, revoked_at=timezone.now())
    APIKey.objects.create(user=user, name="laptop", public_id="2" * 10, digest="2" * 64)
    with pytest.raises(IntegrityError), transaction.atomic():
        APIKey.objects.create(user=user, name="laptop", public_id="3" * 10, digest="3" * 64)


def test_a_remote_server_has_a_known_kind_and_an_address() -> None:
    for fields in ({"kind": "pigeon"}, {"address": ""}, {"max_in_flight": 0}, {"weight": -1}):
        with pytest.raises(IntegrityError), transaction.atomic():
            RemoteServer.objects.create(**{"name": "r", "address": "http://127.0.0.1:1/v1", **fields})


def test_there_is_one_revision_row() -> None:
    with pytest.raises(IntegrityError), transaction.atomic():
        Revision.objects.create(id=2)
