"""Requests: what was asked and what it used. Read only; never counted, for the table grows without end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import BooleanRadioFilter, ChoicesDropdownFilter, FieldTextFilter, RangeDateTimeFilter
from unfold.paginator import InfinitePaginator

from models_app.admin.base import NOTHING, Admin, age, column
from models_app.models import UsageEvent

LABELS = {"ok": "success", "refused": "warning", "error": "danger", "never answered": "default"}


@admin.register(UsageEvent)
class UsageEventAdmin(Admin[UsageEvent]):
    list_display = (
        "started", "outcome", "asked", "who", "tokens", "first", "total", "end_reason",
    )  # fmt: skip
    fieldsets = (
        (None, {"fields": (("request_id", "exactly"), ("endpoint", "stream"), ("model_name", "served_by"), "gateway")}),
        (
            "Asked by",
            {"fields": (("user", "key"), ("user_name", "key_public_id")), "description": "Names stay when the rest is deleted."},
        ),
        ("Outcome", {"fields": (("status", "end_reason"), "error_code")}),
        ("Tokens", {"fields": (("prompt_tokens", "cached_tokens"), "completion_tokens")}),
        ("Times", {"fields": (("queued", "first"), "total")}),
    )
    list_filter = (
        ("started_at", RangeDateTimeFilter),
        ("model_name", FieldTextFilter),
        ("user_name", FieldTextFilter),
        ("end_reason", ChoicesDropdownFilter),
        ("stream", BooleanRadioFilter),
    )
    list_filter_submit = True
    search_fields = ("request_id",)
    search_help_text = "Request id, whole"
    sortable_by = ("started",)
    paginator = InfinitePaginator
    list_fullwidth = True
    list_per_page = 50
    show_full_result_count = False

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: UsageEvent | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: UsageEvent | None = None) -> bool:
        return False

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[UsageEvent], search_term: str
    ) -> tuple[QuerySet[UsageEvent], bool]:
        """Exact, so that its index serves; Django's “=” compares without case and would read the whole table."""
        return (queryset.filter(request_id=search_term.strip()) if search_term.strip() else queryset), False

    @column("time", ordering="started_at", header=True)
    def started(self, event: UsageEvent) -> Sequence[str]:
        return (age(event.started_at), format_html('<span title="{}">…{}</span>', event.request_id, event.request_id[-8:]))

    @column("received")
    def exactly(self, event: UsageEvent) -> str:
        return timezone.localtime(event.started_at).strftime("%Y-%m-%d %H:%M:%S.%f %Z")

    @column("served by")
    def served_by(self, event: UsageEvent) -> SafeString | str:
        kind, _, rest = event.backend.partition(":")
        number, _, generation = rest.partition(":")
        if kind != "instance" or not number.isdigit():
            return f"remote server {rest}" if rest else NOTHING
        address = f"{reverse('admin:models_app_instance_log', args=[int(number)])}?run={generation}"
        return format_html('<a class="as-link" href="{}">instance {}, generation {}</a>', address, number, generation)

    @column("status", label=LABELS)
    def outcome(self, event: UsageEvent) -> tuple[str, str]:
        kind = "error" if event.status >= 500 or event.end_reason in ("error", "gateway_lost") else "ok"
        if 400 <= event.status < 500:
            kind = "refused"
        return ("never answered" if event.status == 0 else kind, str(event.status or "none"))

    @column("model", header=True)
    def asked(self, event: UsageEvent) -> Sequence[str]:
        return (event.model_name or NOTHING, f"{event.endpoint.removeprefix('/v1/')}{' · stream' if event.stream else ''}")

    @column("user", header=True)
    def who(self, event: UsageEvent) -> Sequence[str]:
        return (event.user_name or NOTHING, f"ast_{event.key_public_id}…" if event.key_public_id else "")

    @column("tokens in → out")
    def tokens(self, event: UsageEvent) -> str:
        return f"{_count(event.prompt_tokens)}\u00a0→\u00a0{_count(event.completion_tokens)}"

    @column("waited in the queue")
    def queued(self, event: UsageEvent) -> str:
        return _milliseconds(event.queue_ms)

    @column("first token")
    def first(self, event: UsageEvent) -> str:
        return _milliseconds(event.first_token_ms)

    @column("total")
    def total(self, event: UsageEvent) -> str:
        return _milliseconds(event.total_ms)


def _count(tokens: int | None) -> str:
    return NOTHING if tokens is None else f"{tokens:,}"


def _milliseconds(value: Any) -> str:
    if value is None:
        return NOTHING
    return f"{value:.0f}\u00a0ms" if value < 10_000 else f"{value / 1000:.1f}\u00a0s"
