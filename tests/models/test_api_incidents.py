"""Failures and logs over REST."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.test import Client
from pytest_django.fixtures import Settings

from models_app import lifecycle
from models_app.diagnosis import Exit
from models_app.models import Incident, Instance, State
from tests.models.instances import make_instance, make_model

pytestmark = pytest.mark.django_db

REMEDY = "Lower ctx_size or slots."
DIED = Exit(f"There was not enough memory. {REMEDY}", "last words", None, 9, 512 << 20, "out_of_memory", REMEDY)


@pytest.fixture
def boss() -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("boss"))
    return client


def failed(**fields: Any) -> Instance:
    instance = make_instance(State.STARTING, port=20_001, pid=7, start_ticks=1, generation=3, **fields)
    lifecycle.failed(instance, DIED)
    return instance


def get(client: Client, path: str, status: int = 200) -> Any:
    answer = client.get(f"/api/v1/{path}")
    assert answer.status_code == status, answer.content
    return answer.json()


def test_an_incident_is_read_whole(boss: Client) -> None:
    instance = failed()
    (told,) = get(boss, "incidents/")["results"]
    assert told == get(boss, f"incidents/{told['id']}/")
    expected = {
        "diagnosis": "out_of_memory", "title": "Out of memory", "reason": DIED.reason, "remedy": REMEDY, "count": 1,
        "instance": instance.pk, "instance_number": instance.pk, "generation": 3, "model_name": "smol", "part": "chat",
        "node_name": instance.node.name, "engine": "embedded", "exit_code": None, "exit_signal": 9,
        "peak_memory_bytes": 512 << 20, "log": "last words",
    }  # fmt: skip
    assert expected.items() <= told.items()


def test_an_incident_is_not_written(boss: Client) -> None:
    failed()
    pk = Incident.objects.get().pk
    assert boss.post("/api/v1/incidents/", {}).status_code == 405
    assert boss.delete(f"/api/v1/incidents/{pk}/").status_code == 405
    assert boss.patch(f"/api/v1/incidents/{pk}/", {}).status_code == 405


def test_incidents_are_filtered(boss: Client) -> None:
    first = failed()
    second = failed(model=make_model("other"))
    Incident.objects.filter(instance=second).update(diagnosis="crashed", node_name="far")
    for query, expected in {
        "": {first.pk, second.pk},
        "model_name=smol": {first.pk},
        f"instance={second.pk}": {second.pk},
        "diagnosis=crashed": {second.pk},
        "node_name=far": {second.pk},
        "generation=4": set(),
        "since=2999-01-01": set(),
    }.items():
        assert {row["instance"] for row in get(boss, f"incidents/?{query}")["results"]} == expected, query
    get(boss, "incidents/?instance=x", 400)
    assert [row["instance"] for row in get(boss, "incidents/")["results"]] == [second.pk, first.pk]
    assert get(boss, "incidents/?page_size=1")["count"] == 2


def test_an_instance_tells_its_diagnosis(boss: Client) -> None:
    told = get(boss, f"instances/{failed().pk}/")
    assert (told["diagnosis"], told["exit_signal"], told["exit_reason"]) == ("out_of_memory", 9, DIED.reason)
    assert told["exited_at"]


@pytest.fixture
def logged(settings: Settings, tmp_path: Path) -> Instance:
    """An instance with the logs of two runs on this node."""
    settings.ASSISTANT_INSTANCES_DIR = tmp_path
    instance = failed()
    for run in (1, 2):
        folder = tmp_path / str(instance.pk) / str(run)
        folder.mkdir(parents=True)
        (folder / "engine.log").write_text("".join(f"run {run} line {number}\n" for number in range(300)))
    return instance


def test_a_log_is_read_by_run_and_length(boss: Client, logged: Instance) -> None:
    told = get(boss, f"instances/{logged.pk}/log/")
    assert (told["generation"], told["generations"], told["found"], told["cut"]) == (2, [2, 1], True, True)
    assert (len(told["lines"]), told["lines"][-1]) == (200, "run 2 line 299")
    told = get(boss, f"instances/{logged.pk}/log/?generation=1&lines=2")
    assert told["lines"] == ["run 1 line 298", "run 1 line 299"]
    told = get(boss, f"instances/{logged.pk}/log/?generation=9")
    assert (told["found"], told["lines"]) == (False, [])


@pytest.mark.parametrize(
    "query", ["generation=x", "generation=-1", "generation=99999999999", "lines=0", "lines=5001", "lines=1.5"]
)
def test_a_log_refuses_junk(boss: Client, logged: Instance, query: str) -> None:
    told = get(boss, f"instances/{logged.pk}/log/?{query}", 400)
    assert query.partition("=")[0] in str(told)


def test_a_log_is_for_those_who_may_see_the_instance(logged: Instance) -> None:
    sam = User.objects.create_user("sam", is_staff=True)
    client = Client()
    client.force_login(sam)
    get(client, f"instances/{logged.pk}/log/", 403)
    sam.user_permissions.add(Permission.objects.get(codename="view_instance"))
    get(client, f"instances/{logged.pk}/log/")
    get(client, "incidents/", 403)
    assert Client().get(f"/api/v1/instances/{logged.pk}/log/").status_code == 401
