"""“Check memory” on a model's form: does what stands in the form, saved or not, fit into this node's memory?"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from django.core.exceptions import PermissionDenied
from django.forms import ModelForm
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseNotAllowed
from django.shortcuts import render
from django.urls import URLPattern, path

from models_app import fit
from models_app.admin.base import size
from models_app.admission import Kind
from models_app.exceptions import PreflightError
from models_app.models import ModelConfig

if TYPE_CHECKING:
    from models_app.admin.base import Admin

    _Base = Admin[ModelConfig]
else:
    _Base = object

TONES = {Kind.FITS: "as-good", Kind.FITS_AFTER: "as-good", Kind.WAITS: "", Kind.NEVER: "as-bad"}


class MemoryCheck(_Base):
    """For the admin of ModelConfig."""

    change_form_after_template = "models_app/memory_check.html"

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.check_memory)
        return [
            path("check-memory/", view, name="models_app_modelconfig_check_memory"),
            path("<int:object_id>/check-memory/", view, name="models_app_modelconfig_check_memory"),
            *super().get_urls(),
        ]

    def check_memory(self, request: HttpRequest, object_id: int | None = None) -> HttpResponse:
        """Judge the form's values. They come by POST because they are a form; nothing is written."""
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        model = self.get_object(request, str(object_id)) if object_id is not None else None
        if object_id is not None and model is None:
            raise Http404("There is no such model any more.")
        if not (self.has_change_permission(request, model) if model else self.has_add_permission(request)):
            raise PermissionDenied
        form_class = self.get_form(request, model, change=model is not None)
        return render(request, "models_app/memory_answer.html", judged(form_class(request.POST, instance=copy.copy(model))))


def judged(form: ModelForm[ModelConfig]) -> dict[str, Any]:
    """What the answer's template shows: the sentence and what every part needs, or what is wrong with the form."""
    if not form.is_valid():
        named = ((form.fields[name].label or name if name in form.fields else "", texts) for name, texts in form.errors.items())
        return {"tone": "as-bad", "problems": [f"{label}: {text}" if label else text for label, texts in named for text in texts]}
    try:
        report = fit.judge_model(form.instance)
    except PreflightError as error:
        return {"tone": "as-bad", "problems": [str(error)]}
    return {
        "tone": TONES[report.verdict.kind],
        "sentence": report.verdict.sentence,
        "node": report.node_name,
        "free": size(report.verdict.free_bytes),
        "parts": [_row(part) for part in report.parts],
    }


def _row(part: fit.PartFit) -> dict[str, Any]:
    need = part.need
    return {
        "part": part.part,
        "processes": part.processes,
        "weights": size(need.mapped + need.weights),
        "context": size(need.cache),
        "rest": size(need.compute + need.program + need.prompt_cache + need.margin),
        "needs": size(need.host),
        "gpu": size(need.gpu) if need.gpu else "",
        "measured": size(need.measured) if need.measured else "",
    }
