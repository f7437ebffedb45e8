"""A user's key, from the form to its end: shown once, used, revoked."""

from __future__ import annotations

import re
import secrets

import httpx
import pytest
from playwright.sync_api import expect

from tests.console.browsing import KEYS, USERS, Person, picture
from tests.running_platform import wait_until

pytestmark = [pytest.mark.browser, pytest.mark.platform, pytest.mark.timeout(120)]

SECRET = re.compile(r"ast_[A-Za-z0-9]{10}_[A-Za-z0-9]{20,}")


@pytest.fixture
def user(person: Person) -> str:
    """A new user without any right in the admin."""
    name = f"ada-{secrets.token_hex(3)}"
    password = secrets.token_urlsafe(16)
    person.open(f"{USERS}add/")
    person.page.get_by_label("Username").fill(name)
    person.page.get_by_label("Password", exact=True).fill(password)
    person.page.get_by_label("Password confirmation").fill(password)
    person.save()
    expect(person.page.get_by_text("was added successfully")).to_be_visible()
    return name


def make_key(person: Person, name: str, user: str | None = None) -> tuple[str, httpx.Headers]:
    """Make a key in the form, for the administrator unless told; the text of the one-time page and the headers it came with."""
    page = person.page
    person.open(f"{KEYS}add/")
    if user is not None:
        page.locator(".field-user").get_by_role("combobox").click()
        page.get_by_role("searchbox").last.fill(user)
        page.get_by_role("option", name=user).click()
    page.get_by_label("Name").fill(name)
    with page.expect_response(lambda response: response.request.method == "POST") as posted:
        person.save()
    field = page.get_by_label("API key", exact=True)
    expect(field).to_be_visible()
    return field.input_value(), httpx.Headers(posted.value.all_headers())


def ask(person: Person, key: str) -> int:
    return httpx.get(f"{person.platform.base_url}/v1/models", headers={"authorization": f"Bearer {key}"}, timeout=20).status_code


def test_a_key_is_shown_once_works_and_is_refused_when_revoked(person: Person, user: str) -> None:
    page = person.page
    key, headers = make_key(person, "laptop", user)
    assert SECRET.fullmatch(key)
    assert "no-store" in headers["cache-control"].split(", ")
    expect(page.locator("#curl")).to_contain_text(f"Bearer {key}")
    picture(page, "new-key")
    wait_until(lambda: ask(person, key) == 200, 5, "the new key to be accepted")
    assert person.platform.chat(key=key).status_code == 200

    page.reload()
    expect(page.get_by_text(f"{key[:14]}…").first).to_be_visible()
    for path in (page.url.removeprefix(person.platform.base_url), KEYS):
        person.open(path)
        assert key.split("_", 2)[2] not in page.content()

    person.open_row(KEYS, "laptop")
    person.do("Revoke", "is revoked.")
    wait_until(lambda: ask(person, key) == 401, 4, "the revoked key to be refused")
    expect(person.row(KEYS, "laptop").locator(".field-status")).to_have_text("revoked")


def test_a_key_for_oneself_needs_a_name_only_and_going_back_does_not_show_it_again(person: Person) -> None:
    key, _ = make_key(person, "mine")
    expect(person.page.get_by_role("heading", name="Key “mine” of admin")).to_be_visible()
    person.page.get_by_role("link", name="I have saved it").click()
    expect(person.page.locator("#result_list")).to_be_visible()
    person.page.go_back()
    person.page.wait_for_load_state()
    assert key not in person.page.content()
