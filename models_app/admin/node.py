"""Machines that run engines. A node makes its own row when its worker first starts."""

from __future__ import annotations

from typing import ClassVar

from django import forms
from django.contrib import admin
from django.db.models import Count, Q, QuerySet
from django.forms import ModelForm
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from django.utils.safestring import SafeString

from models_app import tasks
from models_app.admin.base import Admin, age, column, confirmed, done, size
from models_app.models import Node, State
from models_app.models.instance import WITH_PROCESS


@admin.register(Node)
class NodeAdmin(Admin[Node]):
    list_display = ("name", "placement", "processes", "address", "cpus", "memory", "version", "seen")
    search_fields = ("name", "address")
    fields = (("name", "cordoned"), "address", "cpus", "memory", "version", "seen", "boot_id")
    readonly_fields = ("name", "cpus", "memory", "version", "seen", "boot_id")
    actions_row = ("cordon", "uncordon")
    actions_detail = ("cordon", "uncordon")
    ready_processes: ClassVar = Count("instances", filter=Q(instances__state=State.READY))
    all_processes: ClassVar = Count("instances", filter=Q(instances__state__in=WITH_PROCESS))

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def get_queryset(self, request: HttpRequest) -> QuerySet[Node]:
        return super().get_queryset(request).annotate(ready=self.ready_processes, running=self.all_processes)

    @column("placement", label={"open": "success", "cordoned": "warning"})
    def placement(self, node: Node) -> str:
        return "cordoned" if node.cordoned else "open"

    @column("ready / running processes")
    def processes(self, node: Node) -> str:
        return f"{getattr(node, 'ready', 0)} / {getattr(node, 'running', 0)}"

    @column("CPUs", ordering="cpu_count")
    def cpus(self, node: Node) -> int | None:
        return node.cpu_count

    @column("memory", ordering="memory_bytes")
    def memory(self, node: Node) -> str:
        return size(node.memory_bytes)

    @column("last seen", ordering="last_seen_at")
    def seen(self, node: Node) -> SafeString | str:
        return age(node.last_seen_at)

    def save_model(self, request: HttpRequest, obj: Node, form: ModelForm[Node], change: bool) -> None:
        super().save_model(request, obj, form, change)
        tasks.request_reconcile()

    @confirmed("Cordon", "No new process is placed on this node; those that run stay.", icon="block")
    def cordon(self, request: HttpRequest, form: forms.Form, object_id: str) -> HttpResponse:
        return self._set(request, object_id, cordoned=True)

    @confirmed("Uncordon", "New processes may be placed on this node again.", icon="check_circle")
    def uncordon(self, request: HttpRequest, form: forms.Form, object_id: str) -> HttpResponse:
        return self._set(request, object_id, cordoned=False)

    def _set(self, request: HttpRequest, object_id: str, *, cordoned: bool) -> HttpResponse:
        node = self.row(request, object_id)
        Node.objects.filter(pk=node.pk).update(cordoned=cordoned)
        tasks.request_reconcile()
        outcome = "cordoned" if cordoned else "open for new processes"
        self.log_change(request, node, outcome)
        return done(request, f"{node.name} is {outcome}.", fallback=reverse("admin:models_app_node_change", args=[node.pk]))
