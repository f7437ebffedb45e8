"""Nodes: what is known of them, giving them up, and tidying after instances that nobody has a row for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse

from models_app import coordination, fencing, keys, nodes, runtime_folder
from models_app.exceptions import NodeInUse
from models_app.models import Instance, ModelConfig, Node, State
from tests.models.instances import make_instance, make_node
from tests.running_platform import wait_until

AWAY = "away"
CONFIRM = {"_form_submitted": "true"}


@pytest.fixture
def boss(db: None) -> User:
    return User.objects.create_superuser("boss", password="battery staple")


@pytest.fixture
def browser(boss: User) -> Client:
    client = Client()
    client.force_login(boss)
    return client


@pytest.fixture
def api(boss: User) -> Client:
    return Client(headers={"Authorization": f"Bearer {keys.create_key(boss, 'ops', scopes=['admin'])[1]}"})


@pytest.fixture
def beats(valkey: str) -> Iterator[None]:
    """A broker in which nobody beats, before and after."""
    coordination.client().flushdb()
    yield
    coordination.client().flushdb()


@pytest.fixture
def folders(tmp_path: Path, settings: Any) -> Path:
    settings.ASSISTANT_INSTANCES_DIR = tmp_path / "instances"
    settings.ASSISTANT_INSTANCES_DIR.mkdir()
    return tmp_path / "instances"


def run_folder(folders: Path, instance: int, generation: int) -> Path:
    folder = folders / str(instance) / str(generation)
    folder.mkdir(parents=True)
    (folder / "engine.log").write_text("words")
    return folder


@pytest.mark.django_db
@pytest.mark.usefixtures("beats")
class TestState:
    def test_a_node_is_unknown_until_it_beats_and_ready_or_cordoned_while_it_does(self, api: Client) -> None:
        node = make_node(AWAY)

        def state() -> str:
            (told,) = api.get("/api/v1/nodes/").json()["results"]
            assert api.get(f"/api/v1/nodes/{node.pk}/").json()["state"] == told["state"]
            return str(told["state"])

        assert state() == "unknown"
        coordination.node_beat(AWAY, 60_000)
        assert state() == "ready"
        assert api.post(f"/api/v1/nodes/{node.pk}/cordon/").json()["state"] == "cordoned"
        coordination.client().delete(coordination.node_key(AWAY))
        assert state() == "unknown"
        assert api.post(f"/api/v1/nodes/{node.pk}/uncordon/").json()["cordoned"] is False

    def test_the_admin_shows_the_state(self, browser: Client) -> None:
        make_node(AWAY)
        page = browser.get(reverse("admin:models_app_node_changelist")).content.decode()
        assert "unknown" in page
        coordination.node_beat(AWAY, 60_000)
        page = browser.get(reverse("admin:models_app_node_changelist")).content.decode()
        assert "unknown" not in page

    def test_a_list_of_nodes_asks_once(self, api: Client, django_assert_max_num_queries: Any) -> None:
        for number in range(20):
            make_node(f"n{number}")
        with django_assert_max_num_queries(8):
            assert len(api.get("/api/v1/nodes/").json()["results"]) == 20

    def test_a_beat_lasts_twenty_seconds(self) -> None:
        nodes.heartbeat(AWAY)
        left = coordination.client().pttl(coordination.node_key(AWAY))
        assert 0 < left <= 20_000


@pytest.mark.django_db
class TestLimits:
    def test_limits_are_edited_over_rest(self, api: Client) -> None:
        node = make_node(AWAY)
        path = f"/api/v1/nodes/{node.pk}/"
        given = {"max_instances": 3, "memory_limit_bytes": 1 << 33, "name": "elsewhere"}
        told = api.patch(path, given, content_type="application/json").json()
        assert (told["max_instances"], told["memory_limit_bytes"], told["name"]) == (3, 1 << 33, AWAY)
        told = api.patch(path, {"max_instances": None}, content_type="application/json").json()
        assert (told["max_instances"], told["memory_limit_bytes"]) == (None, 1 << 33)

    @pytest.mark.parametrize(
        "wrong", [{"max_instances": -1}, {"memory_limit_bytes": 0}, {"memory_limit_bytes": -5}, {"max_instances": "many"}]
    )
    def test_nonsense_is_refused_with_the_field(self, api: Client, wrong: dict[str, Any]) -> None:
        node = make_node(AWAY)
        reply = api.patch(f"/api/v1/nodes/{node.pk}/", wrong, content_type="application/json")
        assert reply.status_code == 400
        assert next(iter(wrong)) in reply.content.decode()
        assert Node.objects.get(pk=node.pk).max_instances is None

    def test_limits_are_edited_in_the_admin(self, browser: Client) -> None:
        node = make_node(AWAY)
        address = reverse("admin:models_app_node_change", args=[node.pk])
        browser.post(address, {"address": "10.0.0.2", "max_instances": "2", "memory_limit_bytes": str(1 << 30)})
        node.refresh_from_db()
        assert (node.address, node.max_instances, node.memory_limit_bytes) == ("10.0.0.2", 2, 1 << 30)
        page = browser.post(address, {"address": "10.0.0.2", "memory_limit_bytes": "0"})
        assert "memory_limit_bytes must be above 0" in page.content.decode()


@pytest.mark.django_db
@pytest.mark.usefixtures("beats")
class TestFencing:
    @pytest.mark.parametrize("state", [state for state in State if state != State.STOPPED])
    def test_everything_on_a_silent_node_is_given_up(self, state: State) -> None:
        node = make_node(AWAY)
        instance = make_instance(state, node=node, generation=3, port=20_001, pid=2**22 + 1, start_ticks=1)
        other = make_instance(State.READY, node=make_node("here"))
        assert fencing.fence_node(node, "boss") == 1
        instance.refresh_from_db()
        other.refresh_from_db()
        assert (instance.state, other.state) == (State.STOPPED, State.READY)
        assert instance.exit_reason == "Node away was fenced by boss."

    def test_a_node_that_is_heard_is_not_fenced(self, api: Client) -> None:
        node = make_node(AWAY)
        instance = make_instance(State.READY, node=node)
        coordination.node_beat(AWAY, 60_000)
        with pytest.raises(NodeInUse, match="away is heard"):
            fencing.fence_node(node, "boss")
        reply = api.post(f"/api/v1/nodes/{node.pk}/fence/")
        assert (reply.status_code, "is heard" in reply.json()["detail"]) == (409, True)
        assert Instance.objects.get(pk=instance.pk).state == State.READY

    def test_rest_and_the_admin_fence(self, api: Client, browser: Client) -> None:
        first, second = make_instance(State.READY, node=make_node("a")), make_instance(State.READY, node=make_node("b"))
        assert api.post(f"/api/v1/nodes/{first.node_id}/fence/").status_code == 202
        address = reverse("admin:models_app_node_fence", args=[second.node_id])
        browser.get(address)
        assert Instance.objects.get(pk=second.pk).state == State.READY  # a GET changes nothing
        browser.post(address, CONFIRM)
        assert set(Instance.objects.values_list("state", "exit_reason")) == {
            ("STOPPED", "Node a was fenced by boss."),
            ("STOPPED", "Node b was fenced by boss."),
        }

    def test_a_node_that_returns_ends_what_was_given_up_before_it_beats(self, folders: Path) -> None:
        """The engine is a sleeping Python that carries the mark of a generation that was fenced."""
        instance = make_instance(State.READY, node=make_node(), generation=1)
        with marked_process(folders, instance.pk, 1) as stray:
            nodes.heartbeat(instance.node.name)
            assert stray.poll() is None
            coordination.client().delete(coordination.node_key(instance.node.name))
            fencing.fence_node(instance.node, "boss")
            nodes.heartbeat(instance.node.name)
            assert stray.wait(10) == -9
        assert coordination.beating_nodes([instance.node.name])


@pytest.mark.django_db
@pytest.mark.usefixtures("beats")
class TestDeletion:
    def test_a_node_with_current_instances_stays(self, api: Client, browser: Client) -> None:
        instance = make_instance(State.FAILED, node=make_node(AWAY))
        reply = api.delete(f"/api/v1/nodes/{instance.node_id}/")
        assert (reply.status_code, "fence the node" in reply.json()["detail"]) == (409, True)
        browser.post(reverse("admin:models_app_node_delete", args=[instance.node_id]), {"post": "yes"})
        assert Node.objects.filter(name=AWAY).exists()

    def test_a_node_that_beats_stays(self, api: Client) -> None:
        node = make_node(AWAY)
        coordination.node_beat(AWAY, 60_000)
        assert api.delete(f"/api/v1/nodes/{node.pk}/").status_code == 409

    @pytest.mark.parametrize("how", ["rest", "admin", "admin list"])
    def test_one_that_is_gone_goes_with_its_ended_instances(self, api: Client, browser: Client, how: str) -> None:
        ended = make_instance(State.STOPPED, node=make_node(AWAY))
        elsewhere = make_instance(State.STOPPED, node=make_node("here"))
        if how == "rest":
            assert api.delete(f"/api/v1/nodes/{ended.node_id}/").status_code == 204
        elif how == "admin":
            browser.post(reverse("admin:models_app_node_delete", args=[ended.node_id]), {"post": "yes"})
        else:
            form = {"action": "delete_selected", "_selected_action": [ended.node_id], "post": "yes"}
            browser.post(reverse("admin:models_app_node_changelist"), form)
        assert list(Node.objects.values_list("name", flat=True)) == ["here"]
        assert list(Instance.objects.all()) == [elsewhere]
        assert ModelConfig.objects.exists()


class marked_process:
    """A living process that looks like an engine of ours to whoever looks for marks."""

    def __init__(self, folders: Path, instance: int, generation: int) -> None:
        environment = {
            **os.environ,
            runtime_folder.MARK: f"{instance}:{generation}",
            runtime_folder.FOLDER_MARK: str(folders / str(instance) / str(generation)),
        }
        self.process = subprocess.Popen([sys.executable, "-c", "input()"], env=environment, stdin=subprocess.PIPE)

    def __enter__(self) -> subprocess.Popen[bytes]:
        wait_until(lambda: Path(f"/proc/{self.process.pid}/environ").read_bytes(), 5, "the process")
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.mark.django_db
class TestOwnerlessFolders:
    def test_folders_of_instances_without_a_row_go_and_others_stay(self, folders: Path) -> None:
        mine = run_folder(folders, make_instance(State.STOPPED).pk, 1)
        strangers = [run_folder(folders, 90_001, 1), run_folder(folders, 90_001, 2), run_folder(folders, 90_002, 7)]
        assert nodes.remove_ownerless_folders() == 3
        assert [folder.exists() for folder in strangers] == [False] * 3
        assert [entry.name for entry in folders.iterdir()] == [mine.parent.name]
        assert nodes.remove_ownerless_folders() == 0

    def test_a_folder_with_a_living_process_stays_until_it_has_ended(self, folders: Path) -> None:
        folder = run_folder(folders, 90_001, 1)
        with marked_process(folders, 90_001, 1):
            assert nodes.remove_ownerless_folders() == 0
            assert folder.exists()
        assert nodes.remove_ownerless_folders() == 1

    def test_nothing_else_is_touched(self, folders: Path, tmp_path: Path) -> None:
        outside = tmp_path / "outside" / "1"
        outside.mkdir(parents=True)
        (folders / "90001").symlink_to(tmp_path / "outside")
        (folders / "007" / "1").mkdir(parents=True)
        (folders / "notes" / "1").mkdir(parents=True)
        (folders / "٣" / "1").mkdir(parents=True)
        (folders / "90002").write_text("a file")
        (folders / "90003" / "notes").mkdir(parents=True)
        (folders / "90003" / "2").symlink_to(outside)
        kept = sorted(path.relative_to(folders) for path in folders.rglob("*"))
        assert nodes.remove_ownerless_folders() == 0
        assert sorted(path.relative_to(folders) for path in folders.rglob("*")) == kept
        assert outside.exists()

    def test_a_missing_folder_is_no_problem(self, folders: Path) -> None:
        folders.rmdir()
        assert nodes.remove_ownerless_folders() == 0
