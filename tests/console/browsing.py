"""A signed-in person in a real browser: what they click, and a watch over what the browser should never do or say."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import psutil
from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, Page, Request, Response, WebError, expect

from tests.conftest import ROOT
from tests.running_platform import Platform, wait_until

PICTURES = ROOT / "build" / "screenshots"

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
ADMIN = "/admin/"
MODELS = "/admin/models_app/modelconfig/"
INSTANCES = "/admin/models_app/instance/"
KEYS = "/admin/models_app/apikey/"
INCIDENTS = "/admin/models_app/incident/"
USERS = "/admin/auth/user/"
SPARE = "spare-model"


@dataclass
class Watch:
    """What a browser context did and must not: requests to other hosts, console errors, failed requests of any kind."""

    host: str
    findings: list[str] = field(default_factory=list)

    def over(self, context: BrowserContext) -> None:
        context.on("request", self._request)
        context.on("response", self._response)
        context.on("requestfailed", self._failed)
        context.on("console", self._console)
        context.on("weberror", self._error)

    def _request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in {"data", "blob"} and parts.netloc != self.host:
            self.findings.append(f"asked another host: {request.url}")

    def _response(self, response: Response) -> None:
        if response.status >= 400:
            self.findings.append(f"{response.status} for {response.request.method} {response.url}")

    def _failed(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # what was still loading when the page was left
            self.findings.append(f"{request.failure} for {request.url}")

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning", "assert"}:
            self.findings.append(f"console {message.type}: {message.text}")

    def _error(self, error: WebError) -> None:
        self.findings.append(f"uncaught: {error.error}")


def sign_in(page: Page, platform: Platform, password: str | None = None) -> None:
    """Fill in the sign-in form that the page shows, and send it."""
    page.get_by_label("Username").fill("admin")
    page.get_by_label("Password").fill(platform.admin_password if password is None else password)
    page.get_by_role("button", name="Log in").click()


def picture(page: Page, name: str) -> None:
    """Leave a picture of the whole page in build/screenshots/, taken in a window as high as the page."""
    window = page.viewport_size
    assert window is not None
    height = int(page.evaluate("document.documentElement.scrollHeight"))
    if height > window["height"]:
        page.set_viewport_size({"width": window["width"], "height": min(height, 4000)})
    page.screenshot(path=PICTURES / f"{name}.png", animations="disabled")
    if height > window["height"]:
        page.set_viewport_size(window)


def engines(platform: Platform) -> list[psutil.Process]:
    """The engine processes, without their shims."""
    return [process for process in platform.processes("embedded_server") if "shim" not in " ".join(process.cmdline())]


@dataclass
class Person:
    """The administrator at one browser page."""

    page: Page
    platform: Platform

    def open(self, path: str) -> Response:
        """The answer to opening a path of the platform; the page is shown when this returns."""
        response = self.page.goto(self.platform.base_url + path)
        assert response is not None
        return response

    def row(self, path: str, name: str) -> Locator:
        """The row of a list page that holds a link with this text, freshly loaded."""
        self.open(path)
        link = self.page.get_by_role("link", name=name)
        return self.page.locator("#result_list tr").filter(has=link)

    def open_row(self, path: str, name: str) -> None:
        self.row(path, name).get_by_role("link", name=name).click()
        self.page.wait_for_url("**/change/**")

    def wait_for_state(self, model: str, state: str) -> None:
        """Ask until the model is in that state for good, then see that the list of models says so."""
        wait_until(lambda: self._state(model) == state, 60, f"{model} to be {state}")
        expect(self.row(MODELS, model).locator(".field-condition")).to_have_text(state)

    def reload_until_seen(self, wanted: Locator) -> None:
        """For what comes and goes by itself: load the page again and again until it shows that."""

        def seen() -> bool:
            self.page.reload()
            return wanted.is_visible()

        wait_until(seen, 60, str(wanted))

    def _state(self, model: str) -> str:
        """What REST says to this session: cheaper to ask again and again than a page."""
        answer = self.page.request.get(f"{self.platform.base_url}/api/v1/models/?name={model}")
        (found,) = answer.json()["results"]
        return str(found["state"])

    def choose(self, action: str) -> Locator:
        """Click an action in the head of the page; gives the dialog that asks whether it is meant."""
        self.page.locator("a[hx-get]").filter(has_text=re.compile(rf"\b{action}\b")).click()
        dialog = self.page.locator("#dialog")
        expect(dialog.get_by_role("heading", name=re.compile(rf"^{action} .+\?$"))).to_be_visible()
        return dialog

    def do(self, action: str, outcome: str) -> None:
        """An action and its confirmation; returns when the page says the outcome."""
        self.choose(action).get_by_role("button", name=action).click()
        expect(self.page.get_by_text(outcome)).to_be_visible()

    def save(self) -> None:
        self.page.get_by_role("button", name="Save", exact=True).click()

    def add_model(self, name: str, path: str) -> None:
        """Fill in the form for a model, with little context so that it loads fast, and send it."""
        self.open(f"{MODELS}add/")
        self.page.get_by_label("Name").fill(name)
        self.page.get_by_label("Chat model").fill(path)
        self.page.get_by_label("Context size").fill("512")
        self.page.get_by_label("Slots").fill("1")
        self.save()

    def delete_model(self, name: str) -> None:
        self.open_row(MODELS, name)
        self.page.get_by_role("link", name="Delete model").click()
        self.page.get_by_role("button", name="Yes, I’m sure").click()
        expect(self.page.get_by_text("was deleted successfully")).to_be_visible()
