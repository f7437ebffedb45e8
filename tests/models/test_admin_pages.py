"""Every admin page renders, at a bounded price, for those who may see it; nothing there changes state by GET."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.auth.models import Group, Permission, User
from django.core.serializers import serialize
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from models_app import keys, run_log
from models_app.admin import overview
from models_app.admin.base import Admin
from models_app.models import APIKey, Incident, Instance, Load, ModelAlias, ModelConfig, Node, RemoteServer, State, UsageEvent
from tests.models.instances import make_instance, make_model

pytestmark = pytest.mark.django_db

Bound = Callable[[int], AbstractContextManager[None]]
PAGES = (ModelConfig, ModelAlias, Instance, Incident, Load, Node, RemoteServer, APIKey, UsageEvent, User, Group)
BY_HAND = (ModelConfig, ModelAlias, RemoteServer, APIKey, User, Group)
HOSTILE = "<script>alert(1)</script>"
REMEDY = f"Correct {HOSTILE}."


@pytest.fixture
def boss() -> User:
    return User.objects.create_superuser("boss", password="battery staple")


@pytest.fixture
def browser(boss: User) -> Client:
    client = Client()
    client.force_login(boss)
    return client


def populate(count: int) -> None:
    """So many rows of everything."""
    node = Node.objects.create(name="here", last_seen_at=timezone.now(), memory_bytes=1 << 33)
    alice = User.objects.create_user("alice")
    for number in range(count):
        model = ModelConfig.objects.create(name=f"m{number}", chat_model_path=f"/m/{number}.gguf")
        ModelAlias.objects.create(name=f"a{number}", model=model)
        instance = Instance.objects.create(
            model=model, model_name=model.name, node=node, engine="embedded", state="FAILED", exit_code=1, failures=2,
            exit_reason=f"It ended with {HOSTILE}. {REMEDY}", exit_log=f"line 1\n{HOSTILE}", exited_at=timezone.now(),
            diagnosis="bad_option", generation=1,
        )  # fmt: skip
        Incident.objects.create(
            instance=instance, instance_number=instance.pk, generation=1, model_name=model.name, node_name="here",
            engine="embedded", diagnosis="bad_option", reason=instance.exit_reason, remedy=REMEDY, exit_code=1,
            log=instance.exit_log, count=3,
        )  # fmt: skip
        Load.objects.create(
            model=model, model_name=model.name, node=node, instance=instance, generation=2, cause="demand", expected_s=4.0,
            detail=f"It needs {HOSTILE}.",
        )  # fmt: skip
        RemoteServer.objects.create(name=f"r{number}", address="https://api.example.org/v1", models={"x": "y"})
        APIKey.objects.create(user=alice, name=f"k{number}", public_id=f"{number:010}", digest=f"{number:064}")
        UsageEvent.objects.create(
            request_id=f"req-{number}", started_at=timezone.now() - timedelta(minutes=number), user=alice, user_name="alice",
            model_name=model.name, endpoint="/v1/chat/completions", status=200, end_reason="stop", prompt_tokens=10,
            completion_tokens=5, total_ms=12.5,
        )  # fmt: skip
        User.objects.create_user(f"u{number}")
    Group.objects.create(name="operators")


def listing(model: Any) -> str:
    return reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_changelist")


def detail(model: Any, pk: Any) -> str:
    return reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_change", args=[pk])


def external(page: str) -> list[str]:
    """Addresses a browser would fetch from elsewhere."""
    return re.findall(r'(?:src|href)="((?:https?:)?//[^"]*)"', page)


def test_every_model_has_a_page() -> None:
    assert set(PAGES) <= set(admin.site._registry)


def test_lists_forms_and_details_render_without_foreign_addresses(browser: Client) -> None:
    populate(2)
    for model in PAGES:
        addresses = [listing(model), detail(model, model._default_manager.order_by("pk")[0].pk)]
        if model in BY_HAND:
            addresses.append(reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_add"))
        for address in addresses:
            answer = browser.get(address)
            assert answer.status_code == 200, address
            page = answer.content.decode()
            assert not external(page), address
            assert HOSTILE not in page, address


@pytest.mark.parametrize("model", PAGES)
def test_a_list_of_a_hundred_costs_few_queries(browser: Client, model: Any, django_assert_max_num_queries: Bound) -> None:
    populate(100)
    with django_assert_max_num_queries(12):
        page = browser.get(listing(model)).content.decode()
    assert page.count('class="data-row') >= (50 if model not in (Node, Group) else 1)


def test_the_overview_costs_few_queries_and_puts_failures_first(browser: Client, django_assert_max_num_queries: Bound) -> None:
    populate(30)
    with django_assert_max_num_queries(16):
        page = browser.get(reverse("admin:index")).content.decode()
    assert page.index("m29#") < page.index("enabled models ready")
    assert "It ended with &lt;script&gt;" in page
    assert "450" in page  # 30 × (10 + 5) tokens
    assert "http://testserver/v1/chat/completions" in page


def test_the_command_to_copy_names_a_model_that_chats_and_idle_ones_do_not_count_as_ready(browser: Client) -> None:
    ModelConfig.objects.all().delete()
    embed = make_model("embed", chat_model_path="", embedding_model_path="e.gguf", min_replicas=0)
    make_instance(State.READY, embed, part="embedding")
    make_model("talk", min_replicas=0)
    page = browser.get(reverse("admin:index")).content.decode()
    assert "&quot;model&quot;: &quot;talk&quot;" in page or '"model": "talk"' in page
    assert "enabled models ready, 1 when asked" in page
    assert "1 of 0" not in page
    assert "0 of 0" not in page


def test_an_empty_overview_says_what_to_do_first(browser: Client) -> None:
    page = browser.get(reverse("admin:index")).content.decode()
    assert "First steps" in page
    assert reverse("admin:models_app_modelconfig_add") in page
    assert reverse("admin:models_app_apikey_add") in page


def test_the_steps_go_once_they_are_done(browser: Client, boss: User) -> None:
    populate(1)
    keys.create_key(boss, "laptop")
    RemoteServer.objects.update(enabled=True)
    assert "First steps" not in browser.get(reverse("admin:index")).content.decode()


def test_the_figures_of_a_day_are_read_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    populate(8)
    monkeypatch.setattr(overview, "MAX_EVENTS", 5)
    day = overview.last_day()
    assert (day.requests, day.more) == (5, True)


def test_no_action_changes_anything_by_get(browser: Client, boss: User) -> None:
    populate(2)
    cordoned = Node.objects.create(name="there", cordoned=True)
    rows: dict[Any, Any] = {
        ModelConfig: ModelConfig.objects.all()[0],
        Instance: Instance.objects.all()[0],
        APIKey: APIKey.objects.all()[0],
    }
    before = serialize("json", [*ModelConfig.objects.all(), *Instance.objects.all(), *APIKey.objects.all(), *Node.objects.all()])
    tried = 0
    for model, page in admin.site._registry.items():
        if not isinstance(page, Admin):
            continue
        unfold: Any = page
        for action in (*unfold.get_actions_row(_request(boss)), *unfold.get_actions_detail(_request(boss), 1)):
            address = reverse(f"admin:{action.action_name}", args=[rows.get(model, cordoned).pk])
            for answer in (browser.get(address), browser.head(address)):
                assert answer.status_code == 200, address
            assert action.dialog, f"{address} would be a plain link"
            tried += 1
    assert tried >= 16
    after = serialize("json", [*ModelConfig.objects.all(), *Instance.objects.all(), *APIKey.objects.all(), *Node.objects.all()])
    assert after == before


def test_no_action_runs_without_the_csrf_token(boss: User) -> None:
    populate(1)
    browser = Client(enforce_csrf_checks=True)
    browser.force_login(boss)
    for name, pk in (("modelconfig_stop", ModelConfig.objects.get().pk), ("apikey_revoke", APIKey.objects.get().pk)):
        answer = browser.post(reverse(f"admin:models_app_{name}", args=[pk]), {"_form_submitted": "true"})
        assert answer.status_code == 403
    assert ModelConfig.objects.get().enabled
    assert APIKey.objects.get().revoked_at is None


def test_staff_without_permission_see_and_do_nothing(boss: User) -> None:
    populate(1)
    sam = User.objects.create_user("sam", is_staff=True)
    browser = Client()
    browser.force_login(sam)
    for model in PAGES:
        assert browser.get(listing(model)).status_code == 403
    stop = reverse("admin:models_app_modelconfig_stop", args=[ModelConfig.objects.get().pk])
    assert browser.post(stop, {"_form_submitted": "true"}).status_code == 403
    sam.user_permissions.add(Permission.objects.get(codename="view_modelconfig"))
    assert browser.get(listing(ModelConfig)).status_code == 200
    assert browser.post(stop, {"_form_submitted": "true"}).status_code == 403
    assert ModelConfig.objects.get().enabled


def test_ordinary_users_are_sent_to_the_sign_in_page() -> None:
    browser = Client()
    browser.force_login(User.objects.create_user("alice"))
    assert browser.get(reverse("admin:index"))["Location"].startswith("/admin/login/")


def test_instances_and_requests_are_not_written_by_hand(browser: Client) -> None:
    populate(1)
    for model in (Instance, Incident, Load, UsageEvent):
        pk = model._default_manager.get().pk
        name = f"admin:models_app_{model._meta.model_name}"
        assert browser.get(reverse(f"{name}_add")).status_code == 403
        assert browser.post(reverse(f"{name}_change", args=[pk]), {"state": "READY"}).status_code == 403
        assert browser.post(reverse(f"{name}_delete", args=[pk]), {"post": "yes"}).status_code == 403


def test_stopped_instances_are_shown_when_asked_for(browser: Client) -> None:
    populate(1)
    Instance.objects.update(state="STOPPED")
    assert "m0#" not in browser.get(listing(Instance)).content.decode()
    assert "m0#" in browser.get(listing(Instance) + "?shown=ended").content.decode()
    assert "m0#" in browser.get(listing(Instance) + "?shown=all").content.decode()


def test_the_log_of_every_run_is_shown_and_nothing_else(browser: Client, tmp_path: Path, settings: Any) -> None:
    settings.ASSISTANT_INSTANCES_DIR = tmp_path / "instances"
    populate(1)
    instance = Instance.objects.get()
    for run in (1, 2):
        folder = settings.ASSISTANT_INSTANCES_DIR / str(instance.pk) / str(run)
        folder.mkdir(parents=True)
        (folder / "engine.log").write_text("".join(f"run {run} line {number} {HOSTILE}\n" for number in range(300)))
    (tmp_path / "secret").write_text("do not show")
    (settings.ASSISTANT_INSTANCES_DIR / str(instance.pk) / "3").mkdir()
    (settings.ASSISTANT_INSTANCES_DIR / str(instance.pk) / "3" / "engine.log").symlink_to(tmp_path / "secret")
    address = reverse("admin:models_app_instance_log", args=[instance.pk])
    page = browser.get(f"{address}?run=2").content.decode()
    assert "run 2 line 299" in page
    assert "run 2 line 99 " not in page
    assert HOSTILE not in page
    assert "run 1 line 0" in browser.get(f"{address}?run=1&lines=1000").content.decode()
    assert "do not show" not in browser.get(f"{address}?run=3").content.decode()
    for junk in ("../../secret", "-1", "9" * 30, ""):
        assert browser.get(address, {"run": junk}).status_code == 200
    assert browser.get(reverse("admin:models_app_instance_log", args=[999])).status_code == 404


def test_a_tail_joins_the_files_of_a_run(tmp_path: Path, settings: Any) -> None:
    settings.ASSISTANT_INSTANCES_DIR = tmp_path
    folder = tmp_path / "7" / "1"
    folder.mkdir(parents=True)
    (folder / "engine.log").write_text("a\nb\n")
    (folder / "engine.log.tail.1").write_text("c\nd\n")
    (folder / "engine.log.tail").write_text("e\n")
    assert run_log.tail(7, 1, 10) == run_log.LogTail(["a", "b", "c", "d", "e"], found=True, cut=False)
    assert run_log.tail(7, 1, 2).lines == ["d", "e"]
    assert run_log.tail(7, 1, 2).cut
    assert run_log.runs(7) == [1]
    assert run_log.tail(8, 1, 2) == run_log.LogTail([], found=False)
    assert run_log.runs(8) == []


def test_a_request_is_found_by_its_whole_id(browser: Client) -> None:
    populate(12)
    page = browser.get(listing(UsageEvent) + "?q=req-1").content.decode()
    assert page.count('class="data-row') == 1


@pytest.mark.parametrize(
    ("status", "shown"),
    [("active", ["k0", "k3"]), ("expired", ["k1"]), ("revoked", ["k2"]), ("unused", ["k0", "k1", "k2"])],
)
def test_keys_are_filtered_by_status(browser: Client, status: str, shown: list[str]) -> None:
    populate(4)
    now = timezone.now()
    states: list[dict[str, Any]] = [{}, {"expires_at": now}, {"revoked_at": now}, {"last_used_at": now}]
    for key, state in zip(APIKey.objects.order_by("pk"), states, strict=True):
        APIKey.objects.filter(pk=key.pk).update(**state)
    page = browser.get(f"{listing(APIKey)}?status={status}").content.decode()
    assert sorted(set(re.findall(r"\bk[0-3]\b", page))) == shown


def _request(user: User) -> Any:
    from django.test import RequestFactory

    request = RequestFactory().get("/admin/")
    request.user = user
    return request
