"""How a model is doing, in one word and a count: read from its instances, for admin pages and REST. Reads only."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from django.db.models import Prefetch

from models_app import loads
from models_app.contracts.traits import CHAT_ROLE
from models_app.models import Instance, Load, ModelConfig, State
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
    """ready and desired count processes; reason is the sentence of the failed instance, or why nothing is tried; else empty.

    activity: “loading 40 %, about 12 s”, “waits for memory: …”, “loads when asked”; empty where there is nothing to tell.
    """

    condition: Condition
    ready: int
    desired: int
    reason: str = ""
    failed_instance: int | None = None
    activity: str = ""

    @property
    def ready_in_words(self) -> str:
        """“1 of 2”; the count alone where more run than must be kept running, or none must."""
        return f"{self.ready} of {self.desired}" if self.desired and self.ready <= self.desired else str(self.ready)


def with_current_instances(models: ModelConfigQuerySet) -> ModelConfigQuerySet:
    """Prefetch what status_of needs: two queries for the whole page."""
    light = Instance.objects.current().defer("exit_log", "engine_secret")
    under_way = Load.objects.filter(ended_at__isnull=True).order_by("id")
    return models.prefetch_related(
        Prefetch("instances", queryset=light, to_attr="current_instances"),
        Prefetch("loads", queryset=under_way, to_attr="current_loads"),
    )


def status_of(model: ModelConfig) -> ModelStatus:
    """Status of a model that came through with_current_instances, or of any other at two queries."""
    instances: Sequence[Instance] | None = getattr(model, "current_instances", None)
    if instances is None:
        instances = list(model.instances.current().defer("exit_log", "engine_secret")) if model.pk else []
    under_way: Sequence[Load] | None = getattr(model, "current_loads", None)
    if under_way is None:
        under_way = loads.current(model.pk) if model.pk else []
    status = judge(model.enabled, model.min_replicas * len(model.parts), instances)
    return replace(status, activity=_activity(status.condition, instances, under_way))


def _activity(condition: Condition, instances: Iterable[Instance], under_way: Iterable[Load]) -> str:
    holds = {instance.pk: instance.hold for instance in instances}
    words = [_one_activity(load, holds.get(load.instance_id or 0, "")) for load in under_way]
    return " · ".join(words) or ("loads when asked" if condition == Condition.IDLE else "")


def _one_activity(load: Load, hold: str) -> str:
    words = loads.in_words(load, hold=hold)
    return words if load.part == CHAT_ROLE else f"{load.part} {words}"


def judge(enabled: bool, kept: int, instances: Iterable[Instance]) -> ModelStatus:
    """The verdict, from what is wanted and what is there; kept: processes to be kept running, over all parts."""
    instances = list(instances)
    desired = kept if enabled else 0
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
