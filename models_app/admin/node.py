"""Machines that run engines. A node makes its own row when its worker first starts."""

from __future__ import annotations

from typing import Any, ClassVar

from django import forms
from django.contrib import admin, messages
from django.db.models import Count, Q, QuerySet
from django.forms import ModelForm
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from django.utils.safestring import SafeString

from models_app import fencing, nodes, tasks
from models_app.admin.base import Admin, age, column, confirmed, done, size
from models_app.exceptions import AssistantError, CoordinationUnavailable
from models_app.models import Node, State
from models_app.models.instance import WITH_PROCESS

LABELS = {nodes.NodeState.READY: "success", nodes.NodeState.CORDONED: "warning", nodes.NodeState.UNKNOWN: "danger"}


@admin.register(Node)
class NodeAdmin(Admin[Node]):
    list_display = ("name", "condition", "processes", "limits", "address", "cpus", "memory", "version", "seen")
    search_fields = ("name", "address")
    fields = (
        ("name", "condition_now"),
        ("cordoned", "address"),
        ("max_instances", "memory_limit_bytes"),
        "cpus",
        "memory",
        "version",
        "seen",
        "boot_id",
    )
    readonly_fields = ("name", "condition_now", "cpus", "memory", "version", "seen", "boot_id")
    actions_row = ("cordon", "uncordon", "fence")
    actions_detail = ("cordon", "uncordon", "fence")
    ready_processes: ClassVar = Count("instances", filter=Q(instances__state=State.READY))
    all_processes: ClassVar = Count("instances", filter=Q(instances__state__in=WITH_PROCESS))

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def get_queryset(self, request: HttpRequest) -> QuerySet[Node]:
        return super().get_queryset(request).annotate(ready=self.ready_processes, running=self.all_processes)

    @column("state", label=LABELS)
    def condition(self, node: Node) -> nodes.NodeState:
        return nodes.state_of(node, nodes.heard([node]))

    @column("state")
    def condition_now(self, node: Node) -> str:
        return self.condition(node).value

    @column("limits")
    def limits(self, node: Node) -> str:
        processes = "" if node.max_instances is None else f"{node.max_instances} processes"
        memory = "" if node.memory_limit_bytes is None else size(node.memory_limit_bytes)
        return ", ".join(filter(None, (processes, memory))) or "none"

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

    @confirmed(
        "Fence",
        "Say that this silent node is gone: everything on it is given up and started elsewhere. What still runs there is ended "
        "when it comes back.",
        icon="power_off",
        dangerous=True,
    )
    def fence(self, request: HttpRequest, form: forms.Form, object_id: str) -> HttpResponse:
        node = self.row(request, object_id)
        here = reverse("admin:models_app_node_change", args=[node.pk])
        try:
            count = fencing.fence_node(node, request.user.get_username())
        except AssistantError as error:
            return done(request, str(error), fallback=here, level=messages.ERROR)
        tasks.request_reconcile()
        self.log_change(request, node, f"fenced, {count} instances given up")
        return done(request, f"{node.name} is fenced; {count} instances were given up.", fallback=here)

    def _set(self, request: HttpRequest, object_id: str, *, cordoned: bool) -> HttpResponse:
        node = self.row(request, object_id)
        fencing.cordon_node(node, cordoned)
        tasks.request_reconcile()
        outcome = "cordoned" if cordoned else "open for new processes"
        self.log_change(request, node, outcome)
        return done(request, f"{node.name} is {outcome}.", fallback=reverse("admin:models_app_node_change", args=[node.pk]))

    # Deletion: Django would protect a node for the records of instances long ended; what counts is in fencing.in_use.

    def get_deleted_objects(self, objs: Any, request: HttpRequest) -> tuple[list[Any], dict[str, int], set[str], list[str]]:
        listed = list(objs)
        denied = set() if self.has_delete_permission(request) else {str(self.opts.verbose_name)}
        return [str(node) for node in listed], {"nodes": len(listed)}, denied, [why for node in listed if (why := _in_use(node))]

    def delete_model(self, request: HttpRequest, obj: Node) -> None:
        fencing.remove_node(obj)
        tasks.request_reconcile()

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Node]) -> None:
        for node in queryset:
            self.delete_model(request, node)


def _in_use(node: Node) -> str:
    try:
        return fencing.in_use(node)
    except CoordinationUnavailable as error:
        return str(error)
