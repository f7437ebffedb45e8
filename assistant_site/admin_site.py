"""How the admin looks and what its sidebar leads to (django-unfold's settings)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from django.urls import reverse_lazy

if TYPE_CHECKING:
    from django.http import HttpRequest


def _asset(path: str) -> Callable[[HttpRequest], str]:
    """The address of a static file of ours."""

    def address(request: HttpRequest) -> str:
        from django.templatetags.static import static  # settings import this module before Django is set up

        return static(path)

    return address


def _may_view(permission: str) -> Callable[[HttpRequest], bool]:
    """Whether the person signed in may open the page."""

    def allowed(request: HttpRequest) -> bool:
        return request.user.has_perm(permission)

    return allowed


def _page(title: str, icon: str, model: str) -> dict[str, Any]:
    """A sidebar line that leads to a model's list."""
    app, name = model.split(".")
    return {
        "title": title,
        "icon": icon,
        "link": reverse_lazy(f"admin:{app}_{name}_changelist"),
        "permission": _may_view(f"{app}.view_{name}"),
    }


NAVIGATION = [
    {
        "title": "Operate",
        "items": [
            {"title": "Overview", "icon": "dashboard", "link": reverse_lazy("admin:index")},
            _page("Instances", "memory", "models_app.instance"),
            _page("Loads", "downloading", "models_app.load"),
            _page("Incidents", "report", "models_app.incident"),
        ],
    },
    {
        "title": "Serve",
        "separator": True,
        "items": [
            _page("Models", "deployed_code", "models_app.modelconfig"),
            _page("Aliases", "alt_route", "models_app.modelalias"),
            _page("Remote servers", "cloud", "models_app.remoteserver"),
            _page("Nodes", "dns", "models_app.node"),
        ],
    },
    {
        "title": "Access",
        "separator": True,
        "items": [
            _page("Users", "person", "auth.user"),
            _page("Groups", "group", "auth.group"),
            _page("API keys", "key", "models_app.apikey"),
        ],
    },
    {
        "title": "Observe",
        "separator": True,
        "items": [_page("Requests", "receipt_long", "models_app.usageevent")],
    },
    {
        "title": "System",
        "separator": True,
        "items": [{"title": "API docs", "icon": "api", "link": reverse_lazy("api:docs")}],
    },
]

UNFOLD: dict[str, Any] = {
    "SITE_TITLE": "Assistant",
    "SITE_HEADER": "Assistant",
    "SITE_SUBHEADER": "Language models on your machines",
    "SITE_SYMBOL": "hub",
    "SITE_URL": None,
    "SHOW_HISTORY": True,
    "SHOW_VIEW_ON_SITE": False,
    "DASHBOARD_CALLBACK": "models_app.admin.overview.context",
    "SITE_FAVICONS": [{"rel": "icon", "type": "image/svg+xml", "href": _asset("models_app/favicon.svg")}],
    "STYLES": [_asset("models_app/admin.css")],
    "SCRIPTS": [_asset("models_app/admin.js")],
    "BORDER_RADIUS": "6px",
    "COLORS": {
        "primary": {
            "50": "oklch(97.7% .013 236.6)",
            "100": "oklch(95.1% .026 236.8)",
            "200": "oklch(90.1% .058 230.9)",
            "300": "oklch(82.8% .111 230.3)",
            "400": "oklch(74.6% .16 232.7)",
            "500": "oklch(68.5% .169 237.3)",
            "600": "oklch(54.5% .158 242)",
            "700": "oklch(48% .134 242.7)",
            "800": "oklch(42.5% .11 240.8)",
            "900": "oklch(37.5% .09 240.9)",
            "950": "oklch(28.5% .066 243.2)",
        },
    },
    "SIDEBAR": {
        "show_search": True,
        "command_search": True,
        "show_all_applications": False,
        "navigation": NAVIGATION,
    },
    "COMMAND": {"search_models": ["models_app.modelconfig", "models_app.apikey", "auth.user"]},
}
