"""Instances: the engine processes as they are. They follow from models, so nothing is added or edited by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from django import forms
from django.conf import settings
from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import ChoicesDropdownFilter, DropdownFilter, RelatedDropdownFilter

from models_app import diagnosis, operations, run_log, tasks
from models_app.admin import exit_card
from models_app.admin.base import NOTHING, Admin, age, column, confirmed, done, size
from models_app.exceptions import AssistantError
from models_app.models import Incident, Instance, State
from models_app.models.instance import WITH_PROCESS

LABELS = {
    State.PENDING: "info",
    State.STARTING: "info",
    State.READY: "success",
    State.DRAINING: "warning",
    State.STOPPING: "warning",
    State.STOPPED: "default",
    State.FAILED: "danger",
    State.CRASH_LOOP: "danger",
}
LINE_CHOICES = (200, 1000, 5000)
HISTORY_ROWS = 10
RUNS_SHOWN = 10
ENDED = "ended"
ALL = "all"


class ShownFilter(DropdownFilter):  # type: ignore[misc]  # unfold has no types
    """What has not ended, unless asked for."""

    title = "shown"
    parameter_name = "shown"
    all_option = None

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("", "Current"), (ENDED, "Stopped for good"), (ALL, "All")]

    def queryset(self, request: HttpRequest, instances: QuerySet[Instance]) -> QuerySet[Instance]:
        if self.value() == ALL or "state__exact" in request.GET:
            return instances
        ended = instances.filter(state=State.STOPPED)
        return ended if self.value() == ENDED else instances.exclude(state=State.STOPPED)


@dataclass(frozen=True, slots=True)
class LogView:
    """The last lines of one run. elsewhere: another node has them; running: more will come."""

    instance: Instance
    run: int
    lines: int
    tail: run_log.LogTail
    elsewhere: bool
    running: bool

    @classmethod
    def of(cls, instance: Instance, run: int, lines: int) -> LogView:
        return cls(
            instance,
            run,
            lines,
            run_log.tail(instance.pk, run, lines),
            elsewhere=instance.node.name != settings.ASSISTANT_NODE,
            running=run == instance.generation and instance.pid is not None and instance.state in WITH_PROCESS,
        )

    @property
    def text(self) -> str:
        return "\n".join(self.tail.lines)

    @property
    def url(self) -> str:
        """Where the same lines can be asked for again."""
        return self._url(self.run)

    @property
    def newer_url(self) -> str:
        """The log of the newest run, empty where this is it."""
        return self._url(self.instance.generation) if self.run < self.instance.generation else ""

    def _url(self, run: int) -> str:
        return f"{reverse('admin:models_app_instance_log', args=[self.instance.pk])}?run={run}&lines={self.lines}"


@dataclass(frozen=True, slots=True)
class Failure:
    """A line of an instance's history."""

    incident: Incident
    when: SafeString | str
    kind: str
    again: str


def history(instance: Instance) -> list[Failure]:
    """Its newest failures, the present one among them."""
    found = Incident.objects.filter(instance_number=instance.pk).defer("log")[:HISTORY_ROWS]
    return [Failure(one, age(one.at), diagnosis.title(one.diagnosis), exit_card.again(one)) for one in found]


@admin.register(Instance)
class InstanceAdmin(Admin[Instance]):
    list_display = ("title", "condition", "since", "running_pid", "running_port", "node", "failures", "last_exit")
    list_filter = (ShownFilter, ("state", ChoicesDropdownFilter), ("node", RelatedDropdownFilter))
    list_filter_submit = True
    list_select_related = ("node",)
    search_fields = ("model_name",)
    actions = ("restart_selected", "stop_selected")
    actions_row = ("restart", "stop")
    actions_detail = ("restart", "stop")
    change_form_outer_before_template = "models_app/instance_card.html"
    fieldsets = (
        (
            "Process",
            {"fields": (("model", "node"), ("state_now", "since"), ("running_pid", "running_port"), ("generation", "failures"))},
        ),
        ("Size", {"fields": (("engine", "slots"), ("context", "peak_memory"))}),
        ("Times", {"fields": (("created", "started"), ("ready", "gives_up"))}),
        ("Shim", {"fields": (("shim_pid", "launch_digest"),), "classes": ("collapse",)}),
    )

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Instance | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Instance | None = None) -> bool:
        return False

    def has_view_permission(self, request: HttpRequest, obj: Instance | None = None) -> bool:
        return request.user.has_perm("models_app.view_instance") or self.has_operate_permission(request)

    def has_operate_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Restart and stop: no form edits an instance, the permission to change it means this."""
        return request.user.has_perm("models_app.change_instance")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Instance]:
        instances = super().get_queryset(request).defer("engine_secret")
        match = request.resolver_match
        on_list = match is not None and (match.url_name or "").endswith("_changelist")
        return instances.defer("engine_secret", "exit_log") if on_list else instances

    @column("instance", ordering="model_name", header=True)
    def title(self, instance: Instance) -> Sequence[str]:
        return (str(instance), f"generation {instance.generation}" if instance.model_id else "its model was deleted")

    @column("state", label=LABELS, ordering="state")
    def condition(self, instance: Instance) -> tuple[State, str]:
        state = State(instance.state)
        return (state, state.value.lower().replace("_", " "))

    @column("state")
    def state_now(self, instance: Instance) -> str:
        return instance.state.lower().replace("_", " ")

    @column("since", ordering="state_changed_at")
    def since(self, instance: Instance) -> SafeString | str:
        return age(instance.state_changed_at)

    @column("PID", ordering="pid")
    def running_pid(self, instance: Instance) -> str:
        """The row keeps those of its last process; nothing has them any more."""
        return str(instance.pid) if instance.pid is not None and instance.state in WITH_PROCESS else NOTHING

    @column("port", ordering="port")
    def running_port(self, instance: Instance) -> str:
        return str(instance.port) if instance.port is not None and instance.state in WITH_PROCESS else NOTHING

    @column("context size")
    def context(self, instance: Instance) -> str:
        return f"{instance.ctx_size:,} tokens"

    @column("last exit")
    def last_exit(self, instance: Instance) -> SafeString | str:
        if not instance.exit_reason:
            return NOTHING
        short = instance.exit_reason if len(instance.exit_reason) <= 60 else f"{instance.exit_reason[:57]}…"
        kind = diagnosis.title(instance.diagnosis) if instance.diagnosis else short
        return format_html('<span title="{}">{}</span>', instance.exit_reason, kind)

    @column("peak memory of the last run")
    def peak_memory(self, instance: Instance) -> str:
        return size(instance.peak_memory_bytes)

    @column("created")
    def created(self, instance: Instance) -> SafeString | str:
        return age(instance.created_at)

    @column("started")
    def started(self, instance: Instance) -> SafeString | str:
        return age(instance.started_at)

    @column("ready")
    def ready(self, instance: Instance) -> SafeString | str:
        return age(instance.ready_at)

    @column("gives up")
    def gives_up(self, instance: Instance) -> SafeString | str:
        return age(instance.deadline_at)

    def changeform_view(
        self, request: HttpRequest, object_id: str | None = None, form_url: str = "", extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        instance = self.get_object(request, object_id) if object_id else None
        context = {**(extra_context or {})}
        if instance is not None:
            context["card"] = exit_card.of_instance(instance, request)
            context["history"] = history(instance)
            context["log_runs"] = run_log.runs(instance.pk)
            context["log"] = LogView.of(instance, instance.generation, exit_card.CARD_LINES)
        return super().changeform_view(request, object_id, form_url, context)

    def get_urls(self) -> list[URLPattern]:
        log = path("<int:instance_id>/log/", self.admin_site.admin_view(self.log_view), name="models_app_instance_log")
        return [log, *super().get_urls()]

    def log_view(self, request: HttpRequest, instance_id: int) -> HttpResponse:
        """The last lines of one run's log: ?run=<generation>&lines=<count>."""
        instance = self.row(request, instance_id)
        runs = run_log.runs(instance.pk)
        run = _number(request.GET.get("run"), runs[0] if runs else instance.generation)
        lines = _number(request.GET.get("lines"), LINE_CHOICES[0])
        log = LogView.of(instance, run, lines)
        incident = Incident.objects.filter(instance_number=instance.pk, generation=run).first()
        context = {
            **self.admin_site.each_context(request),
            "title": f"Log of {instance}",
            "instance": instance,
            "runs": runs[:RUNS_SHOWN],
            "older_runs": runs[RUNS_SHOWN:],
            "run": run,
            "line_choices": LINE_CHOICES,
            "lines": lines,
            "log": log,
            "incident": incident if not log.running else None,
            "incident_title": diagnosis.title(incident.diagnosis) if incident else "",
            "kept_lines": incident.log if incident else instance.exit_log if run == instance.generation else "",
        }
        return TemplateResponse(request, "models_app/instance_log.html", context)

    @confirmed("Restart", "The process is ended and a new one started in its place.", icon="restart_alt", permission="operate")
    def restart(self, request: HttpRequest, form: forms.Form, object_id: str) -> HttpResponse:
        return self._operate(request, object_id, operations.restart_instance, "is being restarted")

    @confirmed(
        "Stop",
        "The process is ended for good; running requests may end first. Its model gets another if it wants one.",
        icon="stop",
        permission="operate",
        dangerous=True,
    )
    def stop(self, request: HttpRequest, form: forms.Form, object_id: str) -> HttpResponse:
        return self._operate(request, object_id, operations.stop_instance, "is being stopped")

    def _operate(self, request: HttpRequest, object_id: str, operation: Callable[[Instance], Any], outcome: str) -> HttpResponse:
        instance = self.row(request, object_id)
        here = reverse("admin:models_app_instance_change", args=[instance.pk])
        try:
            operation(instance)
        except AssistantError as error:
            return done(request, f"{instance}: {error}", fallback=here, level=messages.ERROR)
        tasks.request_reconcile()
        self.log_change(request, instance, f"{instance} {outcome}")
        return done(request, f"{instance} {outcome}.", fallback=here)

    @admin.action(description="Restart", permissions=["operate"])
    def restart_selected(self, request: HttpRequest, instances: QuerySet[Instance]) -> None:
        self._operate_all(request, instances, operations.restart_instance, "being restarted")

    @admin.action(description="Stop", permissions=["operate"])
    def stop_selected(self, request: HttpRequest, instances: QuerySet[Instance]) -> None:
        self._operate_all(request, instances, operations.stop_instance, "being stopped")

    def _operate_all(
        self, request: HttpRequest, instances: QuerySet[Instance], operation: Callable[[Instance], Any], outcome: str
    ) -> None:
        names = []
        for instance in instances:
            try:
                operation(instance)
            except AssistantError as error:
                self.message_user(request, f"{instance}: {error}", messages.ERROR)
            else:
                names.append(str(instance))
                self.log_change(request, instance, f"{instance} {outcome}")
        if names:
            tasks.request_reconcile()
            self.message_user(request, f"{outcome.capitalize()}: {', '.join(names)}.", messages.SUCCESS)


def _number(raw: str | None, default: int) -> int:
    return int(raw) if raw is not None and raw.isascii() and raw.isdigit() and len(raw) < 10 else default
