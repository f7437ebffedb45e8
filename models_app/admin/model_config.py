"""Models: what should be served, and how that is going."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from django import forms
from django.contrib import admin, messages
from django.db.models import QuerySet
from django.forms import ModelForm
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from unfold.widgets import UnfoldAdminTextareaWidget, UnfoldAdminTextInputWidget

from models_app import model_preflight, model_rules, model_status, operations, tasks
from models_app.admin import exit_card
from models_app.admin.base import Admin, RuleForm, column, confirmed, done, size
from models_app.admin.memory_check import MemoryCheck
from models_app.exceptions import AssistantError, PathNotAllowed
from models_app.model_status import Condition, ModelStatus
from models_app.models import ModelConfig
from models_app.models.model_config import ModelConfigQuerySet

LABELS = {
    Condition.READY: "success",
    Condition.DEGRADED: "warning",
    Condition.LOADING: "info",
    Condition.FAILED: "danger",
    Condition.IDLE: "default",
    Condition.STOPPING: "warning",
    Condition.STOPPED: "default",
}


class ModelFileInput(UnfoldAdminTextInputWidget):  # type: ignore[misc]  # unfold has no types
    """A text field that offers the GGUF files of the allowed folders."""

    def render(self, name: str, value: Any, attrs: dict[str, Any] | None = None, renderer: Any = None) -> SafeString:
        options = format_html_join("", '<option value="{}"></option>', ((file,) for file in model_rules.offered_files()))
        field = super().render(name, value, {**(attrs or {}), "list": f"{name}_files", "autocomplete": "off"}, renderer)
        return format_html('{}<datalist id="{}_files">{}</datalist>', field, name, options)


class ModelConfigForm(RuleForm[ModelConfig]):
    class Meta:
        model = ModelConfig
        exclude: ClassVar = ["revision"]  # everything else is the administrator's
        labels: ClassVar = {
            "chat_model_path": "Chat model",
            "embedding_model_path": "Embedding model",
            "tts_model_path": "Speech model",
            "ctx_size": "Context size",
            "gpu_layers": "GPU layers",
            "idle_timeout_s": "Idle time-out",
            "extra_args": "Extra arguments",
        }
        widgets: ClassVar = {
            **{field: ModelFileInput() for field in model_rules.PATH_FIELDS},
            "extra_args": UnfoldAdminTextareaWidget(attrs={"rows": 3, "spellcheck": "false"}),
        }

    def check_row(self, row: ModelConfig) -> None:
        model_preflight.check_model(row, self.changed_data if row.pk else self.fields)


@admin.register(ModelConfig)
class ModelConfigAdmin(MemoryCheck, Admin[ModelConfig]):
    """Saving asks for a reconcile: processes follow within seconds."""

    form = ModelConfigForm
    list_display = ("title", "condition", "replicas", "engine_name", "file_size", "context", "slots", "enabled")
    list_filter = ("enabled", "engine", "pinned")
    search_fields = ("name", "aliases__name")
    actions = ("start_selected", "stop_selected", "restart_selected")
    actions_row = ("start", "stop", "restart")
    actions_detail = ("start", "stop", "restart")
    conditional_fields: ClassVar = {"port": "max_replicas == 1"}
    change_form_outer_before_template = "models_app/model_failures.html"
    change_form_before_template = "models_app/model_card.html"
    fieldsets = (
        (None, {"fields": (("name", "enabled"), "engine")}),
        (
            "Files",
            {
                "fields": ("chat_model_path", "embedding_model_path", "tts_model_path", "prompt_template", "one_process"),
                "description": "At least one. Files must lie in the folders for model files (ASSISTANT_MODEL_DIRS).",
            },
        ),
        ("Size", {"fields": (("ctx_size", "slots"), ("batch_size", "threads"), "gpu_layers")}),
        ("Processes", {"fields": (("min_replicas", "max_replicas"), "idle_timeout_s", ("priority", "pinned"), "port")}),
        ("Expert", {"fields": ("extra_args",), "classes": ("collapse",)}),
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[ModelConfig]:
        models = super().get_queryset(request)
        assert isinstance(models, ModelConfigQuerySet)
        return model_status.with_current_instances(models).prefetch_related("aliases")

    @column("name", ordering="name", header=True)
    def title(self, model: ModelConfig) -> Sequence[str]:
        aliases = ", ".join(alias.name for alias in model.aliases.all())
        return (model.name, f"also {aliases}" if aliases else "")

    @column("state", label=LABELS)
    def condition(self, model: ModelConfig) -> Condition:
        return model_status.status_of(model).condition

    @column("ready", header=True)
    def replicas(self, model: ModelConfig) -> Sequence[str]:
        status = model_status.status_of(model)
        return (status.ready_in_words, status.activity)

    @column("engine", ordering="engine")
    def engine_name(self, model: ModelConfig) -> str:
        return model.engine

    @column("context", ordering="ctx_size")
    def context(self, model: ModelConfig) -> str:
        return f"{model.ctx_size:,}"

    @column("file size")
    def file_size(self, model: ModelConfig) -> str:
        sizes = [_file_size(path) for path in map(model.__getattribute__, model_rules.PATH_FIELDS) if path]
        return size(sum(filter(None, sizes))) if any(sizes) else "not on this node"

    def changeform_view(
        self, request: HttpRequest, object_id: str | None = None, form_url: str = "", extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        model = self.get_object(request, object_id) if object_id else None
        status = model_status.status_of(model) if model else None
        failures = exit_card.of_model(model, request) if model else []
        context = {**(extra_context or {}), "status": status, "status_link": _link_to_failure(status), "failures": failures}
        return super().changeform_view(request, object_id, form_url, context)

    def save_model(self, request: HttpRequest, obj: ModelConfig, form: ModelForm[ModelConfig], change: bool) -> None:
        super().save_model(request, obj, form, change)
        tasks.request_reconcile()

    def delete_model(self, request: HttpRequest, obj: ModelConfig) -> None:
        super().delete_model(request, obj)
        tasks.request_reconcile()

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[ModelConfig]) -> None:
        super().delete_queryset(request, queryset)
        tasks.request_reconcile()

    @confirmed("Start", "The model is enabled and its processes are started.", icon="play_arrow")
    def start(self, request: HttpRequest, form: forms.Form, object_id: str) -> HttpResponse:
        return self._operate(request, object_id, operations.start_model, "is being started")

    @confirmed("Stop", "The model is disabled. Running requests may end, then its processes go.", icon="stop", dangerous=True)
    def stop(self, request: HttpRequest, form: forms.Form, object_id: str) -> HttpResponse:
        return self._operate(request, object_id, operations.stop_model, "is being stopped")

    @confirmed("Restart", "Every process of the model is replaced by a new one; a crash loop is forgotten.", icon="restart_alt")
    def restart(self, request: HttpRequest, form: forms.Form, object_id: str) -> HttpResponse:
        return self._operate(request, object_id, operations.restart_model, "is being restarted")

    def _operate(
        self, request: HttpRequest, object_id: str, operation: Callable[[ModelConfig], Any], outcome: str
    ) -> HttpResponse:
        model = self.row(request, object_id)
        here = reverse("admin:models_app_modelconfig_change", args=[model.pk])
        try:
            operation(model)
        except AssistantError as error:
            return done(request, f"{model.name}: {error}", fallback=here, level=messages.ERROR)
        tasks.request_reconcile()
        self.log_change(request, model, f"{model.name} {outcome}")
        return done(request, f"{model.name} {outcome}.", fallback=here)

    @admin.action(description="Start", permissions=["change"])
    def start_selected(self, request: HttpRequest, models: QuerySet[ModelConfig]) -> None:
        self._operate_all(request, models, operations.start_model, "being started")

    @admin.action(description="Stop", permissions=["change"])
    def stop_selected(self, request: HttpRequest, models: QuerySet[ModelConfig]) -> None:
        self._operate_all(request, models, operations.stop_model, "being stopped")

    @admin.action(description="Restart", permissions=["change"])
    def restart_selected(self, request: HttpRequest, models: QuerySet[ModelConfig]) -> None:
        self._operate_all(request, models, operations.restart_model, "being restarted")

    def _operate_all(
        self, request: HttpRequest, models: QuerySet[ModelConfig], operation: Callable[[ModelConfig], Any], outcome: str
    ) -> None:
        names = []
        for model in models:
            try:
                operation(model)
            except AssistantError as error:
                self.message_user(request, f"{model.name}: {error}", messages.ERROR)
            else:
                names.append(model.name)
                self.log_change(request, model, f"{model.name} {outcome}")
        if names:
            tasks.request_reconcile()
            self.message_user(request, f"{outcome.capitalize()}: {', '.join(names)}.", messages.SUCCESS)


def _file_size(path: str) -> int | None:
    try:
        return model_rules.resolve_model_path(path).stat().st_size
    except (PathNotAllowed, OSError):
        return None


def _link_to_failure(status: ModelStatus | None) -> str:
    if status is None or status.failed_instance is None:
        return ""
    return reverse("admin:models_app_instance_change", args=[status.failed_instance])
