"""Loads over REST, as jobs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.utils import timezone

from models_app.models import Cause, Load, State
from tests.models.instances import make_instance, make_model

pytestmark = pytest.mark.django_db


@pytest.fixture
def boss() -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("boss"))
    return client


def get(client: Client, path: str) -> Any:
    answer = client.get(f"/api/v1/{path}")
    assert answer.status_code == 200, answer.content
    return answer.json()


def loading(**fields: Any) -> Load:
    instance = make_instance(State.STARTING, generation=1)
    row = {
        "model": instance.model, "model_name": "smol", "node": instance.node, "instance": instance, "generation": 1,
        "cause": Cause.DEMAND, "stage": Load.Stage.LOADING, "started_at": timezone.now() - timedelta(seconds=4),
        "expected_s": 1000.0, "progress": 0.5,
    }  # fmt: skip
    return Load.objects.create(**{**row, **fields})


def test_a_load_is_a_job_with_its_progress(boss: Client) -> None:
    load = loading()
    [told] = get(boss, "jobs/")["results"]
    assert told["eta_s"] == pytest.approx(996.0, abs=60)
    expected = {
        "id": load.pk, "model": load.model_id, "model_name": "smol", "part": "chat", "cause": "demand", "stage": "loading",
        "progress": 0.5, "expected_s": 1000.0, "node": load.node_id, "instance": load.instance_id, "generation": 1,
        "ended_at": None, "detail": "",
    }  # fmt: skip
    assert expected.items() <= told.items()
    assert told["words"].startswith("loading 50 %, about ")
    assert load.node is not None
    assert get(boss, f"jobs/{load.pk}/")["node_name"] == load.node.name


def test_an_ended_job_says_how_it_ended(boss: Client) -> None:
    load = loading(stage=Load.Stage.FAILED, detail="It was killed.", ended_at=timezone.now(), node=None, instance=None)
    told = get(boss, f"jobs/{load.pk}/")
    assert (told["words"], told["eta_s"], told["node"], told["node_name"], told["instance"]) == (
        "It was killed.", None, None, None, None,
    )  # fmt: skip


def test_jobs_are_filtered_and_come_newest_first(boss: Client) -> None:
    old = loading(stage=Load.Stage.READY, ended_at=timezone.now(), instance=None)
    new = loading()
    assert [job["id"] for job in get(boss, "jobs/")["results"]] == [new.pk, old.pk]
    assert [job["id"] for job in get(boss, "jobs/?stage=ready")["results"]] == [old.pk]
    assert [job["id"] for job in get(boss, f"jobs/?instance={new.instance_id}&cause=demand")["results"]] == [new.pk]
    assert get(boss, "jobs/?model_name=other")["results"] == []


def test_a_job_is_not_written(boss: Client) -> None:
    pk = loading().pk
    assert boss.post("/api/v1/jobs/", {}).status_code == 405
    assert boss.delete(f"/api/v1/jobs/{pk}/").status_code == 405


def test_a_model_says_what_it_is_doing(boss: Client) -> None:
    make_model("sleepy", min_replicas=0)
    loading()
    told = {model["name"]: model["activity"] for model in get(boss, "models/")["results"]}
    assert told["sleepy"] == "loads when asked"
    assert told["smol"].startswith("loading 50 %")
