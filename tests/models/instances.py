"""A node, a model and instances in any state, for tests of the control plane."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.conf import settings
from django.utils import timezone

from models_app.lifecycle import Claim
from models_app.models import Instance, ModelConfig, Node, State


def make_node(name: str | None = None) -> Node:
    """This machine, unless named otherwise."""
    node, _ = Node.objects.get_or_create(name=name or settings.ASSISTANT_NODE)
    return node


def make_model(name: str = "smol", **fields: Any) -> ModelConfig:
    return ModelConfig.objects.create(name=name, **{"chat_model_path": "smol.gguf", **fields})


def make_instance(state: State = State.PENDING, model: ModelConfig | None = None, **fields: Any) -> Instance:
    """An instance put into a state by hand, with what the database demands of that state."""
    if model is None:
        model = ModelConfig.objects.filter(name="smol").first() or make_model()
    if state == State.READY:
        fields = {"port": 20_000 + Instance.objects.count(), "pid": 2**22 + 1, "start_ticks": 1, **fields}
    return Instance.objects.create(
        model=model,
        model_name=model.name,
        node=fields.pop("node", None) or make_node(),
        engine=model.engine,
        state=state,
        **fields,
    )


def make_claim(port: int = 20_001, digest: str = "d") -> Claim:
    return Claim(
        port=port,
        sealed_secret="sealed",
        digest=digest,
        launch={},
        model_name="smol",
        engine="embedded",
        slots=2,
        ctx_size=512,
        deadline_at=timezone.now() + timedelta(minutes=5),
    )
