"""Every page opens, fits its window, and asks nobody but the platform; pictures of all are left in build/screenshots/."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, expect

from tests.console.browsing import ADMIN, INSTANCES, KEYS, MODELS, USERS, Person, Watch, picture
from tests.running_platform import Platform

pytestmark = [pytest.mark.browser, pytest.mark.platform, pytest.mark.timeout(120)]

DOCS = "/api/v1/docs/"
NODES = "/admin/models_app/node/"
ALIASES = "/admin/models_app/modelalias/"
REMOTES = "/admin/models_app/remoteserver/"
REQUESTS = "/admin/models_app/usageevent/"
FORMS = [*(f"{path}add/" for path in (MODELS, ALIASES, REMOTES, KEYS, USERS, "/admin/auth/group/")), "/admin/password_change/"]
DESK: ViewportSize = {"width": 1280, "height": 900}
PHONE: ViewportSize = {"width": 390, "height": 844}


def sidebar(person: Person) -> list[str]:
    """The paths the sidebar leads to, without repetition."""
    person.open(ADMIN)
    links = person.page.locator("#nav-sidebar a[href^='/']").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    return list(dict.fromkeys(map(str, links)))


def details(person: Person) -> list[str]:
    """The paths of what lies behind the lists, one of each kind."""
    found = []
    for path in (MODELS, INSTANCES, NODES, ALIASES, USERS, KEYS, REQUESTS):
        person.open(path)
        found.append(str(person.page.locator("#result_list tbody th a").first.get_attribute("href")))
    model, instance = found[0], found[1]
    further = [(model, "history"), (model, "delete"), (instance, "log")]
    return [*found, *(path.partition("/change/")[0] + f"/{page}/" for path, page in further)]


def name_of(path: str) -> str:
    """/admin/models_app/instance/1/log/ is the picture instance-log."""
    words = [word for word in path.split("/") if word and not word.isdigit()]
    return "-".join(words[2:] or words[-1:]).replace("usageevent", "request").replace("modelconfig", "model")


def fits(page: Page) -> bool:
    """No part of the page, nor of the table of a list, is cut off or scrolled to at the side."""
    return bool(
        page.evaluate(
            """() => document.documentElement.scrollWidth <= window.innerWidth
                && (document.querySelector("#result_list")?.getBoundingClientRect().right ?? 0) <= window.innerWidth"""
        )
    )


def test_every_page_opens_and_fits_its_window(person: Person) -> None:
    page = person.page
    assert person.platform.chat().status_code == 200
    menu = sidebar(person)
    assert len(menu) > 8
    menu.remove(DOCS)
    for path in [*menu, *FORMS, *details(person)]:
        page.set_viewport_size(DESK)
        assert person.open(path).status == 200, path
        assert fits(page), path
        picture(page, f"{name_of(path)}-light")
        if path not in FORMS:  # the pages of rows have the same fields
            page.locator("html").evaluate("html => html.classList.add('dark')")  # what the theme switch does
            picture(page, f"{name_of(path)}-dark")
            page.locator("html").evaluate("html => html.classList.remove('dark')")
        page.set_viewport_size(PHONE)
        assert fits(page), f"{path} on a phone"
        picture(page, f"{name_of(path)}-phone")


def test_the_api_docs_are_rendered_with_the_schema(person: Person) -> None:
    person.open(DOCS)
    expect(person.page.locator(".swagger-ui .info .title")).to_contain_text("Assistant admin API")
    restart = person.page.locator(".opblock-summary-path").filter(has_text="restart")
    expect(restart.first).to_be_visible()
    assert fits(person.page)
    picture(person.page, "api-docs")


def test_the_watch_over_these_tests_notices_what_it_is_for(browser: Browser, platform: Platform) -> None:
    context = browser.new_context()
    watch = Watch(urlsplit(platform.base_url).netloc)
    watch.over(context)
    page = context.new_page()
    page.goto(f"{platform.base_url}/admin/login/")
    assert watch.findings == []
    page.evaluate(
        """async () => {
            console.error("a complaint");
            await fetch("/no-such-page/");
            await fetch("https://example.invalid/").catch(() => null);
            setTimeout(() => { throw new Error("a mistake"); });
            await new Promise((resolve) => setTimeout(resolve, 50));
        }"""
    )
    context.close()
    found = " ".join(watch.findings)
    for finding in ("console error: a complaint", "404 for GET", "asked another host: https://example.invalid/", "a mistake"):
        assert finding in found
