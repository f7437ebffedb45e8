"""The first page: what needs a hand, what runs, and how to use it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.contrib import admin
from django.db.models import Q, Sum
from django.http import HttpRequest
from django.urls import reverse
from django.utils import timezone
from django.utils.safestring import SafeString

from models_app import keys, model_status
from models_app.admin.base import age, base_url
from models_app.admin.exit_card import next_attempt
from models_app.contracts.traits import CHAT_ROLE
from models_app.model_status import Condition, ModelStatus
from models_app.models import APIKey, Instance, ModelConfig, RemoteServer, State, UsageEvent

admin.site.index_template = "models_app/overview.html"

MAX_EVENTS = 50_000  # of the last day that one look at the page may read
MAX_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Attention:
    """One thing that needs a hand."""

    what: str
    since: SafeString | str
    why: str
    url: str
    next_attempt: SafeString | str


@dataclass(frozen=True, slots=True)
class Day:
    """The last 24 hours; `more` where the table holds more than one look reads."""

    requests: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    more: bool

    def figures(self) -> dict[str, str]:
        """As they are written, with separators."""
        counts = {
            "requests": self.requests,
            "errors": self.errors,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "tokens": self.prompt_tokens + self.completion_tokens,
        }
        return {name: f"{count:,}" for name, count in counts.items()}


@dataclass(frozen=True, slots=True)
class Step:
    """One step to a first answer."""

    title: str
    text: str
    url: str
    done: bool


def context(request: HttpRequest, given: dict[str, Any]) -> dict[str, Any]:
    """unfold's DASHBOARD_CALLBACK."""
    rows = model_status.with_current_instances(ModelConfig.objects.all())
    models = [(model, model_status.status_of(model)) for model in rows]
    usable_keys = APIKey.objects.usable().count()
    names = keys.known_model_names()
    day = last_day()
    return {
        **given,
        "title": "Overview",
        "attention": attention(),
        "models": models[:MAX_SHOWN],
        "model_count": len(models),
        "ready_models": sum(status.condition == Condition.READY for _, status in models),
        "idle_models": sum(status.condition == Condition.IDLE for _, status in models),
        "wanted_models": sum(model.enabled for model, _ in models),
        "remote_count": RemoteServer.objects.usable().count(),
        "key_count": usable_keys,
        "day": day,
        "figures": day.figures(),
        "base_url": base_url(request),
        "curl_model": example_model(models, names),
        "steps": steps(models, usable_keys),
    }


def attention() -> list[Attention]:
    """Failed instances, newest failure first."""
    failed = Instance.objects.filter(state__in=(State.FAILED, State.CRASH_LOOP)).order_by("-state_changed_at")
    return [
        Attention(
            what=f"{instance} {'failed' if instance.state == State.FAILED else 'is in a crash loop'}",
            since=age(instance.state_changed_at),
            why=instance.exit_reason or "No reason was recorded.",
            url=reverse("admin:models_app_instance_change", args=[instance.pk]),
            next_attempt=next_attempt(instance),
        )
        for instance in failed.defer("exit_log", "engine_secret")[:MAX_SHOWN]
    ]


def last_day() -> Day:
    """Sums over the newest events of the last 24 hours, at most MAX_EVENTS of them."""
    since = timezone.now() - timedelta(hours=24)
    newest = UsageEvent.objects.filter(started_at__gte=since).order_by("-started_at").values("pk")[: MAX_EVENTS + 1]
    found = UsageEvent.objects.filter(pk__in=newest).order_by()
    sums = found.aggregate(prompt=Sum("prompt_tokens"), completion=Sum("completion_tokens"))
    count = found.count()
    return Day(
        requests=min(count, MAX_EVENTS),
        errors=found.filter(Q(status__gte=500) | Q(end_reason__in=("error", "gateway_lost"))).count(),
        prompt_tokens=sums["prompt"] or 0,
        completion_tokens=sums["completion"] or 0,
        more=count > MAX_EVENTS,
    )


def steps(models: list[tuple[ModelConfig, ModelStatus]], usable_keys: int) -> list[Step]:
    """What to do before the first answer; empty once all of it is done."""
    remote = RemoteServer.objects.usable().exists()
    todo = [
        Step(
            "Add a model",
            "Name a GGUF file on this machine, or add a remote server.",
            reverse("admin:models_app_modelconfig_add"),
            bool(models) or remote,
        ),
        Step(
            "See it ready",
            "Enabled models start by themselves; a failure is explained here.",
            reverse("admin:models_app_modelconfig_changelist"),
            any(_serves(model, status) for model, status in models) or remote,
        ),
        Step(
            "Make an API key",
            "One per person or program; it is shown once.",
            reverse("admin:models_app_apikey_add"),
            usable_keys > 0,
        ),
        Step(
            "Send a request",
            "Copy the command below.",
            reverse("admin:models_app_usageevent_changelist"),
            UsageEvent.objects.exists(),
        ),
    ]
    return [] if all(step.done for step in todo) else todo


def _serves(model: ModelConfig, status: ModelStatus) -> bool:
    return model.enabled and status.condition in (Condition.READY, Condition.IDLE)


def example_model(models: list[tuple[ModelConfig, ModelStatus]], names: list[str]) -> str:
    """A model that chats, for the command to copy: a ready one, else one that loads when asked, else any such name."""
    chatting = [(model.name, status.condition) for model, status in models if CHAT_ROLE in model.roles]
    for wanted in (Condition.READY, Condition.IDLE):
        for name, condition in chatting:
            if condition == wanted:
                return name
    mute = {model.name for model, _ in models} - {name for name, _ in chatting}
    return next((name for name in names if name not in mute), "")
