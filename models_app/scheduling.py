"""Ask the scheduler for every part of every model: from rows and from what the gateways say, to how many there shall be.

One decision a round. Between rounds Valkey keeps what the scheduler must remember; without Valkey the number of processes
stays as it is, within minimum and maximum.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from models_app import coordination, scheduler
from models_app.contracts.coordination import PREFIX, GatewayTelemetry, InstanceTelemetry, PartTelemetry, load_field
from models_app.exceptions import CoordinationUnavailable
from models_app.models import Cause, Instance, ModelConfig, State
from models_app.models.instance import LIVE
from models_app.scheduler import Hysteresis, PartView, Replica, Target

log = logging.getLogger(__name__)

PartKey = tuple[int, str]  # model id, part
MEMORY = PREFIX + "scheduler"  # the hash that keeps Hysteresis by load_field()
MEMORY_LIFE_MS = 60_000
USED_EVERY = timedelta(seconds=10)  # between two notes of an instance's last use


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the gateways say and which of them may send where, at one moment. Empty where nobody can be asked.

    holders: gateways with a use key, by "<instance id>:<generation>".
    """

    gateways: Sequence[GatewayTelemetry] = ()
    holders: Mapping[str, Collection[str]] = field(default_factory=dict)

    def of_instance(self, key: str) -> list[InstanceTelemetry]:
        """What each gateway says of "<instance id>:<generation>"."""
        return [gateway["instances"][key] for gateway in self.gateways if key in gateway["instances"]]

    def of_part(self, model_name: str, part: str) -> list[PartTelemetry]:
        """What each gateway says of the queue of a part."""
        parts = (gateway["models"].get(model_name, {}).get(part) for gateway in self.gateways)
        return [one for one in parts if one is not None]

    def knows(self, key: str) -> bool:
        """Whether every gateway that may send to this instance has been heard, and any at all."""
        heard = {gateway["gateway"] for gateway in self.gateways}
        return bool(heard) and heard.issuperset(self.holders.get(key, ()))


@dataclass(frozen=True, slots=True)
class Use:
    """What one instance is good for now. known False: more may be going on than is seen, so it must not count as idle.

    last_at is the end of its last request, else when it became READY; None where it never did.
    """

    known: bool
    in_flight: int
    last_at: datetime | None

    def idle_s(self, now: datetime) -> float | None:
        """Seconds since it was last of use, 0 while it works, None where that is not known."""
        if self.in_flight:
            return 0.0
        if not self.known or self.last_at is None:
            return None
        return max(0.0, (now - self.last_at).total_seconds())


def traffic() -> Traffic:
    """The gateways' word, now."""
    try:
        # Telemetry first: a gateway that takes up an instance between the two questions is then missing, so unknown.
        gateways = coordination.telemetry()
        return Traffic(gateways, coordination.use_holders())
    except CoordinationUnavailable as error:
        log.warning("Nobody knows what the gateways do: %s", error)
        return Traffic()


def key_of(instance: Instance) -> str:
    """An instance's name in telemetry."""
    return f"{instance.pk}:{instance.generation}"


def use_of(instance: Instance, seen: Traffic, now: datetime) -> Use:
    """What one instance is used for, all gateways together."""
    rows = seen.of_instance(key_of(instance))
    ends = [now - timedelta(seconds=row["last_end_s"]) for row in rows if row["last_end_s"] is not None]
    moments = [moment for moment in (*ends, instance.last_used_at, instance.ready_at) if moment is not None]
    return Use(seen.knows(key_of(instance)), sum(row["in_flight"] for row in rows), max(moments, default=None))


def decide(
    models: Iterable[ModelConfig], instances: Sequence[Instance], seen: Traffic, now: datetime
) -> Mapping[PartKey, Target]:
    """How many processes each part of these models shall have. instances: at least all of theirs that have not ended.

    A surge instance, which replaces one that still lives, does not count beside that one. Call it once a round: every
    call is a look, and conditions must hold over several. Also notes when instances were last used.
    """
    _note_use(instances, seen, now)
    before, after, targets = _recall(), {}, {}
    counted = _without_surges(instances)
    for model in models:
        for part in model.parts:
            own = [one for one in counted if (one.model_id, one.part) == (model.pk, part)]
            name = load_field(model.name, part)
            view = _view(model, part, own, seen, now)
            targets[model.pk, part], after[name] = scheduler.target(view, before.get(name, Hysteresis()), now.timestamp())
    _keep(after)
    return targets


def _without_surges(instances: Sequence[Instance]) -> list[Instance]:
    live = [one for one in instances if one.state in LIVE]
    there = {one.pk for one in live}
    return [one for one in live if one.replaces_id not in there]


def _view(model: ModelConfig, part: str, own: Sequence[Instance], seen: Traffic, now: datetime) -> PartView:
    uses = {one.pk: use_of(one, seen, now) for one in own if one.state == State.READY}
    queues = seen.of_part(model.name, part)
    return PartView(
        min_replicas=model.min_replicas,
        max_replicas=model.max_replicas,
        replicas=[_replica(one, uses.get(one.pk), now) for one in own],
        enabled=model.enabled,
        idle_timeout_s=model.idle_timeout_s,
        pinned=model.pinned,
        queued=sum(queue["queued"] for queue in queues),
        wanted=any(queue["wanted"] for queue in queues),
        known=bool(seen.gateways) and all(use.known for use in uses.values()),
    )


def _replica(instance: Instance, use: Use | None, now: datetime) -> Replica:
    if use is None:
        waits = instance.state == State.PENDING and instance.cause == Cause.DEMAND
        return Replica(ready=False, slots=instance.slots, for_requests=waits)
    return Replica(True, instance.slots, use.in_flight, use.idle_s(now))


def _note_use(instances: Iterable[Instance], seen: Traffic, now: datetime) -> None:
    """Instance.last_used_at, to USED_EVERY: it outlives the gateways, and no gateway need learn of it."""
    for instance in instances:
        ends = [row["last_end_s"] for row in seen.of_instance(key_of(instance)) if row["last_end_s"] is not None]
        if not ends:
            continue
        last = now - timedelta(seconds=min(ends))
        if instance.last_used_at is None or last - instance.last_used_at >= USED_EVERY:
            Instance.objects.filter(pk=instance.pk, generation=instance.generation).update(last_used_at=last)
            instance.last_used_at = last


def _recall() -> dict[str, Hysteresis]:
    try:
        return {name: Hysteresis(*values) for name, values in coordination.read_hash(MEMORY).items()}
    except CoordinationUnavailable as error:
        log.debug("The scheduler starts its times anew: %s", error)
        return {}


def _keep(after: Mapping[str, Hysteresis]) -> None:
    try:
        values = {name: [one.pressed_s, one.slack_s, one.at] for name, one in after.items()}
        coordination.replace_hash(MEMORY, values, MEMORY_LIFE_MS)
    except CoordinationUnavailable as error:
        log.debug("The scheduler will start its times anew: %s", error)
