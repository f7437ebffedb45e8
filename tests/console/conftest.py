"""One Chromium for the folder; a fresh, signed-in context for each test, which fails when the watch has found something.

Playwright keeps an event loop running in this thread: the ORM and asyncio tests cannot run meanwhile, so it ends with the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, StorageState, expect, sync_playwright

from tests.console.browsing import ARGUMENTS, SPARE, Person, Watch, engines, sign_in
from tests.running_platform import Platform, wait_until


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


@pytest.fixture
def spare_file(platform: Platform, demo_model: Path) -> Path:
    """Another model file, whole, where the platform may read it."""
    return Path(shutil.copy(demo_model, platform.home / "models" / "spare.gguf"))


@pytest.fixture
def spare_model(person: Person, spare_file: Path) -> Iterator[str]:
    """A model made in the form and READY; deleted afterwards, and its engine gone."""
    person.add_model(SPARE, str(spare_file))
    expect(person.page.get_by_text("was added successfully")).to_be_visible()
    person.wait_for_state(SPARE, "ready")
    yield SPARE
    person.delete_model(SPARE)
    wait_until(lambda: len(engines(person.platform)) == 1, 30, "the engine of the deleted model to be gone")
