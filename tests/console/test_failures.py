"""Failures in a real browser: what the pages say of them, how a start is tried again, and the logs of all runs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.console.browsing import ADMIN, INCIDENTS, INSTANCES, MODELS, Person, engines, picture
from tests.running_platform import wait_until

pytestmark = [pytest.mark.browser, pytest.mark.platform, pytest.mark.timeout(180)]


def spare_engine(person: Person) -> int:
    """The pid of the engine that is not the demo model's: the younger one."""
    return max(engines(person.platform), key=lambda process: process.create_time()).pid


def admin_key(person: Person) -> str:
    made = person.platform.command("create_api_key", "--user", "admin", "--name", "failures", "--scope", "admin")
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def test_a_model_that_cannot_be_loaded_says_why_and_is_tried_again_by_a_button(
    person: Person, spare_model: str, spare_file: Path
) -> None:
    page, whole = person.page, spare_file.read_bytes()
    person.open_row(MODELS, spare_model)
    person.do("Stop", f"{spare_model} is being stopped.")
    person.wait_for_state(spare_model, "stopped")
    spare_file.write_bytes(whole[:20_000_000])
    person.open_row(MODELS, spare_model)
    person.do("Start", f"{spare_model} is being started.")
    person.wait_for_state(spare_model, "failed")

    person.open_row(MODELS, spare_model)
    card = page.get_by_role("region", name="This process failed")
    person.reload_until_seen(card)  # it is tried again between failures
    expect(card).to_contain_text("Model file cut short or damaged.")
    expect(card).to_contain_text("is truncated: has 20,000,000 of")
    picture(page, "model-failed")
    for key, told in ((admin_key(person), "is truncated: has 20,000,000 of"), (None, "An administrator has been told why")):
        answer = person.platform.chat(model=spare_model, key=key)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_failed"), answer.text
        assert told in answer.json()["error"]["message"]
    person.open(ADMIN)
    person.reload_until_seen(page.get_by_role("region", name="Needs attention").get_by_role("link", name=f"{spare_model}#"))
    picture(page, "overview-failed")

    spare_file.write_bytes(whole)
    person.open_row(MODELS, spare_model)
    if card.is_visible():  # unless the platform has tried by itself meanwhile
        card.get_by_role("button", name="Try again").click()
        expect(page.get_by_text("is being restarted.")).to_be_visible()
    person.wait_for_state(spare_model, "ready")


def test_a_crash_is_kept_as_an_incident_with_the_log_of_its_run(person: Person, spare_model: str) -> None:
    page, crashed = person.page, spare_engine(person)
    os.kill(crashed, signal.SIGSEGV)
    wait_until(lambda: spare_engine(person) != crashed and len(engines(person.platform)) == 2, 30, "another engine")
    person.wait_for_state(spare_model, "ready")

    person.open_row(INSTANCES, f"{spare_model}#")
    history = page.get_by_role("region", name=f"Failures of {spare_model}#")
    expect(history).to_contain_text("Crashed")
    expect(page.get_by_text("Follows the running process")).to_be_visible()
    picture(page, "instance-recovered")
    history.get_by_role("row").nth(1).get_by_role("link").click()
    card = page.get_by_role("region", name="Crashed")
    expect(card).to_contain_text("The engine crashed (SIGSEGV)")
    expect(card).to_contain_text("What to do:")
    expect(card).to_contain_text("signal 11 (SIGSEGV)")
    expect(card.get_by_role("button", name="Try again")).to_have_count(0)
    card.get_by_text("Its last lines").click()
    expect(card.locator("[data-log]")).to_contain_text("loading model")
    picture(page, "incident")

    card.get_by_role("link", name="Whole log").click()
    expect(page.get_by_text("This run has ended.")).to_be_visible()
    expect(page.get_by_text("The engine crashed (SIGSEGV)")).to_be_visible()
    picture(page, "instance-log-ended")
    page.get_by_role("link", name="Go to run 2").click()
    expect(page.get_by_text("Follows the running process")).to_be_visible()
    expect(page.get_by_role("link", name="Run 2", exact=True)).to_have_attribute("aria-current", "true")
    page.get_by_role("link", name="Run 1", exact=True).click()
    expect(page.get_by_text("This run has ended.")).to_be_visible()

    person.open(f"{INCIDENTS}?diagnosis=crashed")
    expect(page.locator("#result_list")).to_contain_text(spare_model)
    picture(page, "incidents")


def test_a_log_waits_while_it_is_read_and_follows_again_at_its_end(person: Person, spare_model: str) -> None:
    page = person.page
    person.open_row(INSTANCES, f"{spare_model}#")
    page.set_viewport_size({"width": 900, "height": 500})
    log = page.locator("#log [data-log]")
    expect(log).to_contain_text("loading model")
    log.evaluate("log => { log.style.maxHeight = '4rem'; log.scrollTop = 0; }")
    before = log.inner_text()
    assert person.platform.chat(model=spare_model).status_code == 200
    with page.expect_response(lambda answer: "/log/" in answer.url):
        pass  # a poll has been answered …
    with page.expect_response(lambda answer: "/log/" in answer.url):
        pass  # … and what it did to the page is done
    assert (log.inner_text(), log.evaluate("log => log.scrollTop")) == (before, 0)
    log.evaluate("log => { log.scrollTop = log.scrollHeight; }")
    expect(log).not_to_have_text(before, use_inner_text=True)
    assert log.evaluate("log => log.scrollTop + log.clientHeight >= log.scrollHeight - 1")
