"""The button “Check memory” on a model's form, in a real browser on the whole platform."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.console.browsing import MODELS, Person, picture
from tests.running_platform import MODEL

pytestmark = [pytest.mark.browser, pytest.mark.platform, pytest.mark.timeout(180)]


def test_the_form_is_judged_as_it_stands_and_nothing_is_saved(person: Person) -> None:
    person.open_row(MODELS, MODEL)
    page = person.page
    page.get_by_role("button", name="Check memory").click()
    answer = page.locator("#memory-answer")
    expect(answer).to_contain_text("It fits.")
    page.locator("#id_ctx_size").fill("100000000")
    page.get_by_role("button", name="Check memory").click()
    expect(answer).to_contain_text("It does not fit: needs")
    expect(answer).to_contain_text("fits with ctx_size ≤")
    picture(page, "memory-check")
    assert person.platform.chat().status_code == 200


def test_mistakes_of_the_form_are_answered_beside_the_button(person: Person) -> None:
    person.open(f"{MODELS}add/")
    person.page.get_by_role("button", name="Check memory").click()
    expect(person.page.locator("#memory-answer")).to_contain_text("Name: This field is required.")
