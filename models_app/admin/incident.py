"""Incidents: failures as they were diagnosed, kept after their instances have recovered. Read only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import DropdownFilter, FieldTextFilter, RangeDateTimeFilter

from models_app import diagnosis
from models_app.admin import exit_card
from models_app.admin.base import Admin, age, column, size
from models_app.diagnosis_rules import TITLES
from models_app.models import Incident


class DiagnosisFilter(DropdownFilter):  # type: ignore[misc]  # unfold has no types
    title = "diagnosis"
    parameter_name = "diagnosis"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return sorted(((code.value, words) for code, words in TITLES.items()), key=lambda pair: pair[1])

    def queryset(self, request: HttpRequest, incidents: QuerySet[Incident]) -> QuerySet[Incident]:
        return incidents.filter(diagnosis=self.value()) if self.value() else incidents


@admin.register(Incident)
class IncidentAdmin(Admin[Incident]):
    list_display = ("when", "kind", "whom", "what", "node_name")
    list_filter = (
        ("at", RangeDateTimeFilter),
        DiagnosisFilter,
        ("model_name", FieldTextFilter),
        ("node_name", FieldTextFilter),
    )
    list_filter_submit = True
    search_fields = ("model_name", "reason")
    sortable_by = ("when",)
    list_fullwidth = True
    change_form_outer_before_template = "models_app/incident_card.html"
    fieldsets = (
        (
            None,
            {
                "fields": (
                    ("kind_now", "instance_link"),
                    ("engine", "part"),
                    ("first_seen", "last_seen"),
                    ("count", "peak_memory"),
                )
            },
        ),
    )

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Incident | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Incident | None = None) -> bool:
        return False

    def get_queryset(self, request: HttpRequest) -> QuerySet[Incident]:
        incidents = super().get_queryset(request)
        match = request.resolver_match
        on_list = match is not None and (match.url_name or "").endswith("_changelist")
        return incidents.defer("log") if on_list else incidents.select_related("instance").defer("instance__engine_secret")

    @column("time", ordering="at", header=True)
    def when(self, incident: Incident) -> Sequence[SafeString | str]:
        return (age(incident.at), exit_card.again(incident))

    @column("diagnosis")
    def kind(self, incident: Incident) -> str:
        return diagnosis.title(incident.diagnosis)

    @column("diagnosis")
    def kind_now(self, incident: Incident) -> str:
        return diagnosis.title(incident.diagnosis)

    @column("instance", header=True)
    def whom(self, incident: Incident) -> Sequence[str]:
        part = "" if incident.part == "chat" else f", {incident.part}"
        return (f"{incident.model_name}#{incident.instance_number}", f"generation {incident.generation}{part}")

    @column("what happened")
    def what(self, incident: Incident) -> SafeString:
        short = incident.reason if len(incident.reason) <= 100 else f"{incident.reason[:97]}…"
        return format_html('<span title="{}">{}</span>', incident.reason, short)

    @column("instance")
    def instance_link(self, incident: Incident) -> SafeString | str:
        name = f"{incident.model_name}#{incident.instance_number}"
        if incident.instance_id is None:
            return f"{name}, which is gone"
        address = reverse("admin:models_app_instance_change", args=[incident.instance_id])
        return format_html('<a class="as-link" href="{}">{}</a>', address, name)

    @column("first seen")
    def first_seen(self, incident: Incident) -> SafeString | str:
        return age(incident.at)

    @column("last seen")
    def last_seen(self, incident: Incident) -> SafeString | str:
        return age(incident.last_at)

    @column("peak memory")
    def peak_memory(self, incident: Incident) -> str:
        return size(incident.peak_memory_bytes)

    def changeform_view(
        self, request: HttpRequest, object_id: str | None = None, form_url: str = "", extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        incident = self.get_object(request, object_id) if object_id else None
        card = exit_card.of_incident(incident, request) if incident else None
        return super().changeform_view(request, object_id, form_url, {**(extra_context or {}), "card": card})
