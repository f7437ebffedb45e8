"""Make observed follow desired: read the world, have planning.py decide, write rows.

What must happen to processes is returned as Orders: whoever calls has them carried out on the right node.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from django.conf import settings
from django.utils import timezone

from models_app import coordination, launch_spec, lifecycle, runtime_folder, scheduling
from models_app.exceptions import CoordinationUnavailable, StaleTransition
from models_app.models import Cause, DrainReason, Instance, ModelConfig, Node, State
from models_app.planning import Action, Create, Desired, Drain, Drop, NodeView, Observed, Order, Placement, Reset, World, plan
from models_app.scheduler import Target
from models_app.scheduling import PartKey, Traffic

log = logging.getLogger(__name__)

PASSES = 2


@dataclass(frozen=True, slots=True)
class Round:
    """What a round came to: what processes need, left to the caller, and how many of each part there shall be."""

    orders: list[Order]
    targets: Mapping[PartKey, Target]


def reconcile() -> list[Order]:
    """One round; its orders."""
    return run_round().orders


def run_round() -> Round:
    """Read, decide, plan, write rows.

    What was written is planned for again at once, so that a new instance need not wait for the next round.
    """
    seen, now = scheduling.traffic(), timezone.now()
    before = _current()
    targets = scheduling.decide(list(ModelConfig.objects.enabled()), before, seen, now)
    known = {one.pk for one in before}
    orders: list[Order] = []
    for _ in range(PASSES):
        actions = plan(observe(targets, seen, now, known), timezone.now())
        orders = apply(actions)
        if all(isinstance(action, Order) for action in actions):
            break
    return Round(orders, targets)


def _current() -> list[Instance]:
    return list(Instance.objects.current().select_related("node").defer("exit_log", "engine_secret"))


def observe(targets: Mapping[PartKey, Target], seen: Traffic, now: datetime, known: Collection[int]) -> World:
    """Desired, by these targets, and observed, as it is now.

    A model that was enabled after they were decided waits for the next round, and so does what was started by hand since,
    which is not among the known instances: it would be taken for one too many.
    """
    models = [model for model in ModelConfig.objects.enabled() if all((model.pk, part) in targets for part in model.parts)]
    desired = [_desired(model, part, targets[model.pk, part]) for model in models for part in model.parts]
    instances = [one for one in _current() if one.pk in known or one.cause != Cause.MANUAL]
    return World(desired, [_observed(one, seen, now) for one in instances], observe_nodes())


def _desired(model: ModelConfig, part: str, target: Target) -> Desired:
    return Desired(
        model_id=model.pk,
        part=part,
        replicas=target.replicas,
        max_replicas=model.max_replicas,
        digest=launch_spec.digest(model, part),
        cause=target.cause,
        may_surge=model.port is None,
    )


def _observed(one: Instance, seen: Traffic, now: datetime) -> Observed:
    use = scheduling.use_of(one, seen, now)
    return Observed(
        instance_id=one.pk,
        generation=one.generation,
        model_id=one.model_id,
        part=one.part,
        node=one.node.name,
        state=State(one.state),
        digest=one.launch_digest,
        next_attempt_at=one.next_attempt_at,
        replaces=one.replaces_id,
        hold=one.hold,
        busy=use.in_flight > 0,
        used_at=use.last_at,
        makes_room=one.makes_room,
    )


def observe_nodes() -> list[NodeView]:
    """Every node, and whether its worker beats."""
    nodes = list(Node.objects.all())
    try:
        beating = coordination.beating_nodes([node.name for node in nodes])
    except CoordinationUnavailable as error:
        log.warning("Taking this node alone as alive: %s", error)
        beating = {settings.ASSISTANT_NODE}
    return [NodeView(node.pk, node.name, node.name in beating, node.cordoned) for node in nodes]


def choose_node() -> int | None:
    """Id of the node where a new instance should go, None where no worker is heard."""
    load: dict[str, int] = {}
    for name in Instance.objects.current().values_list("node__name", flat=True):
        load[name] = load.get(name, 0) + 1
    chosen = Placement(observe_nodes(), load).choose()
    return None if chosen is None else chosen.node_id


def apply(actions: Iterable[Action]) -> list[Order]:
    """Write the rows; what was overtaken meanwhile is left to the next round. Returns what processes need."""
    orders: list[Order] = []
    for action in actions:
        if isinstance(action, Order):
            orders.append(action)
            continue
        try:
            orders += _write(action)
        except (StaleTransition, Instance.DoesNotExist, ModelConfig.DoesNotExist, Node.DoesNotExist) as error:
            log.info("Overtaken: %s", error)
    return orders


def _write(action: Create | Reset | Drop | Drain) -> list[Order]:
    if isinstance(action, Create):
        model, node = ModelConfig.objects.get(pk=action.model_id), Node.objects.get(pk=action.node_id)
        replaced = Instance.objects.filter(pk=action.replaces).first() if action.replaces else None
        lifecycle.create(model, node, action.part, action.cause, replaced)
        return []
    instance = Instance.objects.get(pk=action.instance_id, generation=action.generation)
    if isinstance(action, Reset):
        lifecycle.reset(instance)
        return []
    if isinstance(action, Drop):
        lifecycle.stopped(instance)
        return []
    detail = _why_it_goes(instance, action.reason)
    lifecycle.draining(instance, action.reason, detail)
    log.info("%s drains: %s", instance, detail)
    return [Order("advance", action.instance_id, action.generation, action.node)]


def _why_it_goes(instance: Instance, reason: str) -> str:
    """One sentence for whoever asks later why this process ended."""
    model = instance.model
    if model is None or not model.enabled:
        return "Stopped, for its model was disabled or deleted."
    if reason != DrainReason.STOP:
        return "Unloaded, for it was not needed any more."
    if not instance.launch_digest:
        return "Replaced as asked."
    if instance.launch_digest == launch_spec.digest(model, instance.part):
        return "Stopped, for there were more processes than max_replicas."
    changed = launch_spec.differences(instance.launch, launch_spec.launch_values(model, instance.part))
    return f"Replaced because {', '.join(changed)}." if changed else "Replaced by one with the present settings."


def prune(node_name: str) -> int:
    """Delete ended instances of this node beyond the newest of each model, with their runtime folders; how many."""
    seen: dict[str, int] = {}
    old = []
    ended = Instance.objects.filter(state=State.STOPPED, node__name=node_name).order_by("-id")
    for pk, model_name in ended.values_list("pk", "model_name"):
        seen[model_name] = seen.get(model_name, 0) + 1
        if seen[model_name] > settings.ASSISTANT_STOPPED_KEPT:
            old.append(pk)
    for pk in old:
        runtime_folder.remove(pk)
    Instance.objects.filter(pk__in=old).delete()
    return len(old)
