"""Operating models in the admin: what runs is shown as it is, and the form and the dialogs make it so."""

from __future__ import annotations

import socket

import psutil
import pytest
from playwright.sync_api import Browser, expect

from tests.console.browsing import ADMIN, INSTANCES, MODELS, Person, Watch, engines, picture, sign_in
from tests.running_platform import MODEL, Platform, wait_until

pytestmark = [pytest.mark.browser, pytest.mark.platform, pytest.mark.timeout(180)]


def test_signing_in_leads_to_the_overview(browser: Browser, platform: Platform, watch: Watch) -> None:
    context = browser.new_context()
    watch.over(context)
    page = context.new_page()
    page.goto(platform.base_url)
    sign_in(page, platform, password="not the password")
    expect(page.get_by_text("Please enter the correct username and password")).to_be_visible()
    picture(page, "sign-in-refused")
    sign_in(page, platform)
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name=MODEL))
    expect(row).to_contain_text("ready")
    expect(page.locator("#base-url")).to_have_text(f"{platform.base_url}/v1")
    context.close()


def test_the_model_list_shows_the_demo_ready_under_its_alias(person: Person) -> None:
    row = person.row(MODELS, MODEL)
    expect(row.locator(".field-condition")).to_have_text("ready")
    expect(row.locator(".field-replicas")).to_have_text("1 of 1")
    expect(row).to_contain_text("also demo")


def test_the_instance_list_shows_the_process_as_it_is(person: Person) -> None:
    engine = person.platform.engine()
    row = person.row(INSTANCES, MODEL)
    expect(row.locator(".field-condition")).to_have_text("ready")
    expect(row.locator(".field-running_pid")).to_have_text(str(engine.pid))
    expect(row.locator(".field-node")).to_have_text(socket.gethostname())
    ports = {connection.laddr.port for connection in engine.net_connections() if connection.status == psutil.CONN_LISTEN}
    assert {int(row.locator(".field-running_port").inner_text())} == ports


def test_the_page_of_an_instance_shows_the_end_of_the_engines_log_which_grows_by_itself(person: Person) -> None:
    person.open_row(INSTANCES, MODEL)
    page = person.page
    expect(page.get_by_text("Follows the running process")).to_be_visible()
    log = page.locator("#log [data-log]")
    before = log.inner_text()
    assert person.platform.chat().status_code == 200
    expect(log).not_to_have_text(before, use_inner_text=True)
    assert page.evaluate("log => log.scrollTop + log.clientHeight >= log.scrollHeight - 1", log.element_handle())
    page.get_by_role("link", name="Whole log").first.click()
    expect(log).to_contain_text("loading model")


def test_a_model_made_in_the_form_answers(person: Person, spare_model: str) -> None:
    answer = person.platform.chat(model=spare_model)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == spare_model
    assert answer.json()["choices"][0]["message"]["content"]
    assert len(engines(person.platform)) == 2


def test_the_dialogs_stop_start_and_restart_a_model(person: Person, spare_model: str) -> None:
    first = {engine.pid for engine in engines(person.platform)}
    person.open_row(MODELS, spare_model)
    person.do("Stop", f"{spare_model} is being stopped.")
    person.wait_for_state(spare_model, "stopped")
    assert person.platform.chat(model=spare_model).status_code in {404, 503}
    assert len(engines(person.platform)) == 1

    person.open_row(MODELS, spare_model)
    person.do("Start", f"{spare_model} is being started.")
    person.wait_for_state(spare_model, "ready")
    assert person.platform.chat(model=spare_model).status_code == 200
    second = {engine.pid for engine in engines(person.platform)}
    assert len(second - first) == 1

    person.open_row(MODELS, spare_model)
    person.do("Restart", f"{spare_model} is being restarted.")
    wait_until(lambda: second - {engine.pid for engine in engines(person.platform)}, 30, "the old engine to be gone")
    person.wait_for_state(spare_model, "ready")
    assert person.platform.chat(model=spare_model).status_code == 200


def test_an_action_that_is_not_confirmed_does_nothing(person: Person) -> None:
    engine = person.platform.engine().pid
    person.open_row(MODELS, MODEL)
    dialog = person.choose("Stop")
    picture(person.page, "dialog")
    dialog.get_by_role("link", name="Cancel").click()
    expect(dialog).to_be_hidden()
    expect(person.row(MODELS, MODEL).locator(".field-condition")).to_have_text("ready")
    assert person.platform.engine().pid == engine


def test_a_file_outside_the_model_folders_is_refused_by_naming_the_folders(person: Person) -> None:
    person.add_model("outside", "/etc/hostname")
    error = person.page.get_by_text("/etc/hostname is outside the folders for model files")
    expect(error).to_be_visible()
    expect(error).to_contain_text(str(person.platform.home / "models"))
    expect(person.page.get_by_label("Chat model")).to_have_value("/etc/hostname")
    picture(person.page, "model-add-refused")
    expect(person.row(MODELS, "outside")).to_have_count(0)


def test_a_file_that_is_not_there_is_refused_before_anything_is_started(person: Person) -> None:
    person.add_model("absent", "absent.gguf")
    expect(person.page.get_by_text("There is no file absent.gguf on this node")).to_be_visible()
    person.open(ADMIN)
    expect(person.page.get_by_role("link", name="absent")).to_have_count(0)
