"""One Chromium for the folder; a fresh, signed-in context for each test, which fails when the watch has found something.

Playwright keeps an event loop running in this thread: the ORM and asyncio tests cannot run meanwhile, so it ends with the folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, StorageState, expect, sync_playwright

from tests.console.browsing import ARGUMENTS, Person, Watch, sign_in
from tests.running_platform import Platform


@pytest.fixture(scope="package")
def browser(chromium: str) -> Iterator[Browser]:
    expect.set_options(timeout=10_000)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="package")
def session(browser: Browser, platform: Platform) -> StorageState:
    """The cookies of the administrator, signed in once."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{platform.base_url}/admin/")
    sign_in(page, platform)
    page.wait_for_url("**/admin/")
    state = context.storage_state()
    context.close()
    return state


@pytest.fixture
def watch(platform: Platform) -> Iterator[Watch]:
    watching = Watch(urlsplit(platform.base_url).netloc)
    yield watching
    assert watching.findings == []


@pytest.fixture
def person(browser: Browser, platform: Platform, session: StorageState, watch: Watch) -> Iterator[Person]:
    context = browser.new_context(storage_state=session, viewport={"width": 1280, "height": 900})
    watch.over(context)
    yield Person(context.new_page(), platform)
    context.close()
