"""Failures in the admin: the card with what to do, the history, the list of incidents, the log of each run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.urls import reverse
from pytest_django.fixtures import Settings

from models_app import lifecycle
from models_app.diagnosis import Exit
from models_app.models import Incident, Instance, State
from tests.models.instances import make_claim, make_instance, make_model

pytestmark = pytest.mark.django_db

HOSTILE = "<script>alert(1)</script>"
REMEDY = "Lower ctx_size or slots."
DIED = Exit(f"There was not enough memory {HOSTILE}. {REMEDY}", f"line 1\n{HOSTILE}", 1, None, 512 << 20, "out_of_memory", REMEDY)


@pytest.fixture
def browser() -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("boss"))
    return client


def staff(*permissions: str) -> Client:
    sam = User.objects.create_user("sam", is_staff=True)
    sam.user_permissions.add(*Permission.objects.filter(codename__in=permissions))
    client = Client()
    client.force_login(sam)
    return client


def failed(**fields: Any) -> Instance:
    instance = make_instance(State.STARTING, port=20_001, pid=7, start_ticks=1, generation=3, **fields)
    lifecycle.failed(instance, DIED)
    return instance


def url(name: str, *args: Any) -> str:
    return reverse(f"admin:models_app_{name}", args=args)


def text(client: Client, address: str) -> str:
    answer = client.get(address)
    assert answer.status_code == 200, address
    page = answer.content.decode()
    assert HOSTILE not in page
    return page


def card(page: str) -> str:
    found = re.search(r'<section class="as-card as-alert.*?</section>', page, re.DOTALL)
    return found[0] if found else ""


def test_the_card_says_what_happened_what_to_do_and_on_what_evidence(browser: Client) -> None:
    shown = card(text(browser, url("instance_change", failed().pk)))
    assert "This process failed and will be tried again" in shown
    assert "Out of memory. There was not enough memory &lt;script&gt;alert(1)&lt;/script&gt;.</p>" in shown
    assert f"<strong>What to do:</strong> {REMEDY}" in shown
    assert "exit code 1" in shown
    assert "peak memory 512 MiB" in shown
    assert "line 1\n&lt;script&gt;" in shown
    assert "<details" in shown
    assert f"{url('instance_log', Instance.objects.get().pk)}?run=3" in shown


def test_a_signal_has_its_name() -> None:
    from models_app.admin.exit_card import exit_in_words

    assert [exit_in_words(None, 11), exit_in_words(None, 63), exit_in_words(2, None), exit_in_words(None, None)] == [
        "signal 11 (SIGSEGV)", "signal 63", "exit code 2", "",
    ]  # fmt: skip


def test_try_again_is_a_post_that_resets_the_instance(browser: Client) -> None:
    instance = failed()
    Instance.objects.update(state=State.CRASH_LOOP)
    shown = card(text(browser, url("instance_change", instance.pk)))
    form = re.search(
        r'<form method="post" action="([^"]+)">.*?name="(_form_submitted)" value="(\w+)".*?Try again', shown, re.DOTALL
    )
    assert form, shown
    assert "csrfmiddlewaretoken" in form[0]
    browser.post(form[1], {form[2]: form[3]})
    assert Instance.objects.get().state == State.PENDING


def test_who_may_only_look_gets_no_buttons() -> None:
    shown = card(text(staff("view_instance", "view_incident"), url("instance_change", failed().pk)))
    assert "Out of memory" in shown
    assert "Try again" not in shown
    assert "Change the model" not in shown


def test_an_instance_that_recovered_shows_no_failure_but_its_history(browser: Client) -> None:
    instance = failed()
    lifecycle.starting(instance, make_claim())
    Instance.objects.update(pid=7)
    instance.refresh_from_db()
    lifecycle.ready(instance)
    page = text(browser, url("instance_change", instance.pk))
    assert card(page) == ""
    assert f"Failures of {instance}" in page
    assert url("incident_change", Incident.objects.get().pk) in page
    assert f"{url('incident_changelist')}?instance_number={instance.pk}" in page


def test_the_model_s_page_shows_its_failed_processes_and_leads_to_its_incidents(browser: Client) -> None:
    instance = failed()
    page = text(browser, url("modelconfig_change", instance.model_id))
    assert REMEDY in card(page)
    assert "Try again" in card(page)
    assert page.index("</section>") < page.index('id="modelconfig_form"')  # forms cannot be nested
    assert f"{url('incident_changelist')}?model_name=smol" in page


def test_an_incident_has_a_page_of_its_own_also_without_its_instance(browser: Client) -> None:
    instance = failed()
    address = url("incident_change", Incident.objects.get().pk)
    assert "Try again" in card(text(browser, address))
    lifecycle.starting(instance, make_claim())
    assert "Try again" not in card(text(browser, address))
    Instance.objects.all().delete()
    page = text(browser, address)
    assert "which is gone" in page
    assert REMEDY in card(page)
    assert "line 1\n&lt;script&gt;" in page


def test_incidents_are_filtered(browser: Client) -> None:
    first = failed()
    second = failed(model=make_model("other"))
    Incident.objects.filter(instance=second).update(diagnosis="crashed", node_name="far")
    listing = url("incident_changelist")
    for query, shown in (
        ("", {first, second}),
        ("?diagnosis=crashed", {second}),
        ("?model_name=smol", {first}),
        ("?model_name__icontains=oth", {second}),
        ("?node_name__icontains=far", {second}),
        (f"?instance_number={first.pk}", {first}),
        ("?q=memory", {first, second}),
        ("?q=other", {second}),
    ):
        page = text(browser, listing + query)
        rows = page[page.index('id="result_list"') :]
        assert {one for one in (first, second) if f"{one}" in rows} == shown, query


def test_a_refusal_that_repeats_says_how_often(browser: Client) -> None:
    instance = make_instance()
    for _ in range(4):
        lifecycle.refused(instance, "There is no file x.gguf; put it back.", "d")
    shown = card(text(browser, url("instance_change", instance.pk)))
    assert "Cannot start here. There is no file x.gguf; put it back." in shown
    assert "seen 4 times" in shown
    assert "What to do" not in shown


# The log page


def write_log(settings: Settings, instance: Instance, run: int, content: str) -> None:
    folder = Path(settings.ASSISTANT_INSTANCES_DIR) / str(instance.pk) / str(run)
    folder.mkdir(parents=True)
    (folder / "engine.log").write_text(content)


@pytest.fixture
def logged(settings: Settings, tmp_path: Path) -> Instance:
    """An instance whose second run runs; both runs have a log, the first ended badly."""
    settings.ASSISTANT_INSTANCES_DIR = tmp_path
    instance = make_instance(State.STARTING, port=20_001, pid=7, start_ticks=1, generation=1)
    lifecycle.failed(instance, DIED)
    lifecycle.starting(instance, make_claim())
    Instance.objects.update(pid=8)
    write_log(settings, instance, 1, "first words\n")
    write_log(settings, instance, 2, "second words\n")
    return instance


def test_the_log_opens_at_the_newest_run_and_follows_it(browser: Client, logged: Instance) -> None:
    page = text(browser, url("instance_log", logged.pk))
    assert "second words" in page
    assert "first words" not in page
    assert 'hx-trigger="every 3s"' in page


def test_an_earlier_run_is_not_followed_says_how_it_ended_and_leads_to_the_newest(browser: Client, logged: Instance) -> None:
    page = text(browser, url("instance_log", logged.pk) + "?run=1")
    assert "first words" in page
    assert "every 3s" not in page
    assert "Out of memory." in page
    assert re.search(r'href="[^"]*\?run=2&amp;lines=200">Go to run 2', page)


def test_a_run_whose_folder_has_gone_still_shows_what_was_kept_of_it(browser: Client, logged: Instance) -> None:
    Incident.objects.update(generation=7)
    page = text(browser, url("instance_log", logged.pk) + "?run=7")
    assert "This run has left no log" in page
    assert "line 1\n&lt;script&gt;" in page


def test_many_runs_are_offered_in_a_list(browser: Client, logged: Instance, settings: Settings) -> None:
    for run in range(3, 15):
        write_log(settings, logged, run, f"run {run} speaks\n")
    page = text(browser, url("instance_log", logged.pk) + "?run=2")
    assert page.count("Run ") == 14
    assert '<option value="2" selected>Run 2</option>' in page


def test_a_change_that_cannot_start_says_that_the_old_process_goes_on(browser: Client) -> None:
    old = make_instance(State.READY)
    new = make_instance(State.STARTING, replaces=old, port=20_001, pid=7, start_ticks=1)
    lifecycle.failed(new, DIED)
    page = text(browser, url("modelconfig_change", old.model_id))
    assert "the process from before the change goes on serving" in page
    assert "Whole log" not in card(page)  # it never ran


def test_a_dialog_names_what_it_is_about_and_is_red_where_it_is_dangerous(browser: Client) -> None:
    model = make_model("talk")
    stop = text(browser, url("modelconfig_stop", model.pk))
    start = text(browser, url("modelconfig_start", model.pk))
    assert ">Stop talk?<" in "".join(stop.split("\n")).replace("  ", "")
    assert ">Start talk?<" in "".join(start.split("\n")).replace("  ", "")
    assert "bg-red-600" in stop
    assert "bg-red-600" not in start


def test_a_dialog_does_not_tell_a_name_to_somebody_who_may_not_act(db: None) -> None:
    model = make_model("talk")
    answer = staff("view_node").get(url("modelconfig_stop", model.pk))
    assert answer.status_code == 403
    assert "talk" not in answer.content.decode()
