"""Loads: what is being started, for whom, how far it is, and how earlier ones went. Read only."""

from __future__ import annotations

from collections.abc import Sequence

from django.contrib import admin
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import ChoicesDropdownFilter, FieldTextFilter, RangeDateTimeFilter, RelatedDropdownFilter

from models_app import loads
from models_app.admin.base import NOTHING, Admin, age, column
from models_app.models import Load

LABELS = {
    Load.Stage.WAITING: "warning",
    Load.Stage.LOADING: "info",
    Load.Stage.READY: "success",
    Load.Stage.FAILED: "danger",
    Load.Stage.CANCELLED: "default",
}


@admin.register(Load)
class LoadAdmin(Admin[Load]):
    list_display = ("when", "outcome", "whom", "cause", "took", "words", "node")
    list_filter = (
        ("stage", ChoicesDropdownFilter),
        ("cause", ChoicesDropdownFilter),
        ("model_name", FieldTextFilter),
        ("node", RelatedDropdownFilter),
        ("created_at", RangeDateTimeFilter),
    )
    list_filter_submit = True
    list_select_related = ("node",)
    search_fields = ("model_name",)
    sortable_by = ("when",)
    list_fullwidth = True
    fieldsets = (
        (None, {"fields": (("outcome_now", "cause"), ("model_name", "part"), ("instance_link", "node"), "words")}),
        ("Times", {"fields": (("wanted", "started"), ("ended", "seen"), ("took", "expected"))}),
    )

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Load | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Load | None = None) -> bool:
        return False

    @column("wanted", ordering="id")
    def when(self, load: Load) -> SafeString | str:
        return age(load.created_at)

    @column("stage", label=LABELS)
    def outcome(self, load: Load) -> str:
        return load.stage

    @column("stage")
    def outcome_now(self, load: Load) -> str:
        return load.stage

    @column("model", header=True)
    def whom(self, load: Load) -> Sequence[str]:
        part = "" if load.part == "chat" else f"{load.part}, "
        return (load.model_name, f"{part}generation {load.generation}")

    @column("took")
    def took(self, load: Load) -> str:
        if load.started_at is None or load.ended_at is None:
            return NOTHING
        return f"{(load.ended_at - load.started_at).total_seconds():.1f} s"

    @column("expected")
    def expected(self, load: Load) -> str:
        return NOTHING if load.expected_s is None else f"{load.expected_s:.1f} s"

    @column("how it goes")
    def words(self, load: Load) -> str:
        return loads.in_words(load)

    @column("instance")
    def instance_link(self, load: Load) -> SafeString | str:
        if load.instance_id is None:
            return "gone"
        address = reverse("admin:models_app_instance_change", args=[load.instance_id])
        return format_html('<a class="as-link" href="{}">{}#{}</a>', address, load.model_name, load.instance_id)

    @column("wanted")
    def wanted(self, load: Load) -> SafeString | str:
        return age(load.created_at)

    @column("started")
    def started(self, load: Load) -> SafeString | str:
        return age(load.started_at)

    @column("ended")
    def ended(self, load: Load) -> SafeString | str:
        return age(load.ended_at)

    @column("last looked at")
    def seen(self, load: Load) -> SafeString | str:
        return age(load.heartbeat_at)
