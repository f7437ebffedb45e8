"""Real engines on real models, started as instances and ended with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pytest_django.fixtures import Settings

from models_app import provisioning
from models_app.contracts import secret_box
from models_app.models import Instance
from tests.models.instances import make_instance, make_model
from tests.models.test_provisioning import settle

Start = Callable[..., Instance]
Client = Callable[[Instance], httpx.Client]


@pytest.fixture
def start_engine(settings: Settings, tmp_path: Path, demo_model: Path) -> Iterator[Start]:
    """Starts one part of a new model on the demo model (or on what `fields` say) and waits until it is ready or has failed."""
    settings.ASSISTANT_INSTANCES_DIR = tmp_path / "instances"
    settings.ASSISTANT_MODEL_DIRS = [demo_model.parent, tmp_path]
    instances: list[Instance] = []

    def start(part: str = "chat", name: str = "smol", **fields: Any) -> Instance:
        fields = {"ctx_size": 512, "slots": 2, f"{part}_model_path": str(demo_model), **fields}
        instance = make_instance(model=make_model(name, **{"chat_model_path": "", **fields}), part=part)
        instances.append(instance)
        assert provisioning.provision(instance), instance.exit_reason
        return settle(instance)

    yield start
    for instance in instances:
        assert provisioning.kill(instance)


@pytest.fixture
def engine_client(settings: Settings) -> Iterator[Client]:
    """A client with the key of an engine."""
    made: list[httpx.Client] = []

    def client(instance: Instance) -> httpx.Client:
        key = secret_box.unseal(settings.SECRET_KEY, instance.engine_secret)
        address = f"http://127.0.0.1:{instance.port}"
        made.append(httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"}, timeout=60, trust_env=False))
        return made[-1]

    yield client
    for one in made:
        one.close()
