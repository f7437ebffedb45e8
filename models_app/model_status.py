"""How a model is doing, in one word and a count: read from its instances, for admin pages and REST. Reads only."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from django.db.models import Prefetch

from models_app.models import Instance, ModelConfig, State
from models_app.models.model_config import ModelConfigQuerySet

NOWHERE = "No node has taken it yet. If this stays: is a worker running, and is any node neither silent nor cordoned?"


class Condition(enum.StrEnum):
    """READY: as many as wanted. DEGRADED: some. FAILED: none, and one says why. IDLE: none wanted now, starts on demand."""

    READY = "ready"
    DEGRADED = "degraded"
    LOADING = "loading"
    FAILED = "failed"
    IDLE = "idle"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """ready and desired count processes; reason is the sentence of the failed instance, or why nothing is tried; else empty."""

    condition: Condition
    ready: int
    desired: int
    reason: str = ""
    failed_instance: int | None = None


def with_current_instances(models: ModelConfigQuerySet) -> ModelConfigQuerySet:
    """Prefetch what status_of needs: one query for the whole page."""
    light = Instance.objects.current().defer("exit_log", "engine_secret")
    return models.prefetch_related(Prefetch("instances", queryset=light, to_attr="current_instances"))


def status_of(model: ModelConfig) -> ModelStatus:
    """Status of a model that came through with_current_instances, or of any other at one query."""
    instances: Sequence[Instance] | None = getattr(model, "current_instances", None)
    if instances is None:
        instances = list(model.instances.current().defer("exit_log", "engine_secret")) if model.pk else []
    return judge(model.enabled, model.min_replicas, instances)


def judge(enabled: bool, min_replicas: int, instances: Iterable[Instance]) -> ModelStatus:
    """The verdict, from what is wanted and what is there."""
    instances = list(instances)
    desired = min_replicas if enabled else 0
    ready = sum(instance.state == State.READY for instance in instances)
    failed = next((one for one in instances if one.state in (State.FAILED, State.CRASH_LOOP)), None)
    loading = any(instance.state in (State.PENDING, State.STARTING) for instance in instances)
    if not enabled:
        condition = Condition.STOPPING if instances else Condition.STOPPED
    elif ready and ready >= desired:
        condition = Condition.READY
    elif ready:
        condition = Condition.DEGRADED
    elif failed is not None:
        condition = Condition.FAILED
    elif loading or desired:
        condition = Condition.LOADING
    else:
        condition = Condition.IDLE
    reason = failed.exit_reason if failed else NOWHERE if condition == Condition.LOADING and not instances else ""
    return ModelStatus(condition, ready, desired, reason, failed.pk if failed and enabled else None)
