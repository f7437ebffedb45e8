"""Make observed follow desired. `plan` decides and is pure; `observe` reads and `apply` writes rows.

What must happen to processes is returned as Orders: whoever calls has them carried out on the right node.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from django.conf import settings
from django.utils import timezone

from models_app import coordination, launch_spec, lifecycle, runtime_folder
from models_app.exceptions import CoordinationUnavailable, StaleTransition
from models_app.models import Instance, ModelConfig, Node, State
from models_app.models.instance import LIVE, WITH_PROCESS

log = logging.getLogger(__name__)

PASSES = 2


@dataclass(frozen=True, slots=True)
class Desired:
    """One part of one model. replicas is how many processes of it there shall be now, 0 where the model is disabled."""

    model_id: int
    part: str
    replicas: int
    max_replicas: int
    digest: str


@dataclass(frozen=True, slots=True)
class Observed:
    """One instance that has not ended. model_id is None once the model is deleted."""

    instance_id: int
    generation: int
    model_id: int | None
    part: str
    node: str
    state: State
    digest: str
    next_attempt_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class NodeView:
    """One machine. heard: its worker beats, so orders to it will be carried out."""

    node_id: int
    name: str
    heard: bool
    cordoned: bool


@dataclass(frozen=True, slots=True)
class World:
    models: Sequence[Desired]
    instances: Sequence[Observed]
    nodes: Sequence[NodeView]


@dataclass(frozen=True, slots=True)
class Create:
    """A new PENDING instance."""

    model_id: int
    part: str
    node_id: int


@dataclass(frozen=True, slots=True)
class Reset:
    """FAILED or CRASH_LOOP → PENDING, for the configuration it failed with has changed."""

    instance_id: int
    generation: int


@dataclass(frozen=True, slots=True)
class Drop:
    """PENDING, FAILED or CRASH_LOOP → STOPPED: there is no process to end."""

    instance_id: int
    generation: int


@dataclass(frozen=True, slots=True)
class Drain:
    """READY → DRAINING; whoever carries it out orders `advance` on the node."""

    instance_id: int
    generation: int
    node: str


@dataclass(frozen=True, slots=True)
class Order:
    """Something to be done to a process by its node's worker; a stale one does nothing there.

    start: PENDING or FAILED → STARTING. stop: end one that is STARTING. advance: look on, nobody may be looking any more.
    """

    do: Literal["start", "stop", "advance"]
    instance_id: int
    generation: int
    node: str


Action = Create | Reset | Drop | Drain | Order

# Surplus instances go in this order: those that serve nobody first.
_LEAST_USEFUL_FIRST = (State.CRASH_LOOP, State.FAILED, State.PENDING, State.STARTING, State.READY)


@dataclass(slots=True)
class _Placement:
    """Where new instances go: the node with the fewest, counted as the plan adds to them."""

    nodes: Sequence[NodeView]
    load: dict[str, int] = field(default_factory=dict)

    def choose(self) -> NodeView | None:
        usable = [node for node in self.nodes if node.heard and not node.cordoned]
        if not usable:
            return None
        chosen = min(usable, key=lambda node: (self.load.get(node.name, 0), node.name))
        self.load[chosen.name] = self.load.get(chosen.name, 0) + 1
        return chosen


def plan(world: World, now: datetime) -> list[Action]:
    """What to do next. Planning again after its actions took effect leads to rest: no action but `advance`.

    Nodes that are not heard get no orders: nobody would carry them out, and their queue would only grow.
    """
    load: dict[str, int] = {}
    for one in world.instances:
        load[one.node] = load.get(one.node, 0) + 1
    placement = _Placement(world.nodes, load)
    moving = (State.STARTING, State.DRAINING, State.STOPPING)
    actions: list[Action] = [_order("advance", one) for one in world.instances if one.state in moving]
    for model in world.models:
        own = [one for one in world.instances if (one.model_id, one.part) == (model.model_id, model.part)]
        actions += _plan_model(model, own, placement, now)
    wanted = {(model.model_id, model.part) for model in world.models}
    actions += [_end(one) for one in world.instances if (one.model_id, one.part) not in wanted and one.state in LIVE]
    heard = {node.name for node in world.nodes if node.heard}
    return [action for action in actions if not isinstance(action, Order) or action.node in heard]


def _order(do: Literal["start", "stop", "advance"], one: Observed) -> Order:
    return Order(do, one.instance_id, one.generation, one.node)


def _end(one: Observed) -> Action:
    if one.state == State.READY:
        return Drain(one.instance_id, one.generation, one.node)
    return _order("stop", one) if one.state == State.STARTING else Drop(one.instance_id, one.generation)


def _outdated(model: Desired, one: Observed) -> bool:
    return one.state != State.PENDING and one.digest != model.digest


def _plan_model(model: Desired, own: Sequence[Observed], placement: _Placement, now: datetime) -> list[Action]:
    live = sorted(
        (one for one in own if one.state in LIVE),
        key=lambda one: (_LEAST_USEFUL_FIRST.index(one.state), not _outdated(model, one), -one.instance_id),
    )
    surplus = max(0, len(live) - model.replicas)
    going, staying = live[:surplus], live[surplus:]
    return [
        *(_end(one) for one in going),
        *_create(model.replicas - len(live), model, placement),
        *_replace(model, own, staying, placement),
        *_start(model, own, staying, now),
    ]


def _create(count: int, model: Desired, placement: _Placement) -> list[Action]:
    nodes = [placement.choose() for _ in range(count)]
    return [Create(model.model_id, model.part, node.node_id) for node in nodes if node is not None]


def _replace(model: Desired, own: Sequence[Observed], staying: Sequence[Observed], placement: _Placement) -> list[Action]:
    """Instances launched with another specification: one at a time, and the next only when every new one is READY.

    So a bad configuration takes down one replica and no more. The new one is created first: an interruption between the
    two leaves one too many rather than one too few.
    """
    old = [one for one in staying if _outdated(model, one)]
    resets: list[Action] = [
        Reset(one.instance_id, one.generation) for one in old if one.state in (State.FAILED, State.CRASH_LOOP)
    ]
    running = [one for one in old if one.state in (State.STARTING, State.READY)]
    if resets or not running or any(one.state != State.READY for one in own if one not in running):
        return resets
    # One that is not ready serves nobody: it goes first.
    victim = min(running, key=lambda one: (one.state == State.READY, one.instance_id))
    created = _create(1, model, placement)
    return [*created, _end(victim)] if created else []


def _start(model: Desired, own: Sequence[Observed], staying: Sequence[Observed], now: datetime) -> list[Action]:
    """Start what waits, as far as max_replicas leaves room: a process that is still ending holds its memory and its port."""
    room = model.max_replicas - sum(one.state in WITH_PROCESS for one in own)
    due = [one for one in staying if one.state == State.PENDING or _retry_due(model, one, now)]
    return [_order("start", one) for one in due[: max(0, room)]]


def _retry_due(model: Desired, one: Observed, now: datetime) -> bool:
    if one.state != State.FAILED or _outdated(model, one) or one.next_attempt_at is None:
        return False
    return one.next_attempt_at <= now


# Effects


def reconcile() -> list[Order]:
    """One round: read, plan, write rows. The orders are left to the caller.

    What was written is planned for again at once, so that a new instance need not wait for the next round.
    """
    orders: list[Order] = []
    for _ in range(PASSES):
        actions = plan(observe(), timezone.now())
        orders = apply(actions)
        if all(isinstance(action, Order) for action in actions):
            break
    return orders


def observe() -> World:
    """Desired and observed as they are now."""
    instances = [
        Observed(
            one.pk,
            one.generation,
            one.model_id,
            one.part,
            one.node.name,
            State(one.state),
            one.launch_digest,
            one.next_attempt_at,
        )
        for one in Instance.objects.current().select_related("node").defer("exit_log", "engine_secret")
    ]
    desired = [_desired(model, part, instances) for model in ModelConfig.objects.enabled() for part in model.parts]
    return World(desired, instances, observe_nodes())


def _desired(model: ModelConfig, part: str, instances: Iterable[Observed]) -> Desired:
    """Between minimum and maximum the number stays as it is: only demand and idleness move it."""
    live = sum((one.model_id, one.part) == (model.pk, part) and one.state in LIVE for one in instances)
    replicas = min(max(live, model.min_replicas), model.max_replicas)
    return Desired(model.pk, part, replicas, model.max_replicas, launch_spec.digest(model, part))


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
    chosen = _Placement(observe_nodes(), load).choose()
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
        lifecycle.create(ModelConfig.objects.get(pk=action.model_id), Node.objects.get(pk=action.node_id), action.part)
        return []
    instance = Instance.objects.get(pk=action.instance_id, generation=action.generation)
    if isinstance(action, Reset):
        lifecycle.reset(instance)
        return []
    if isinstance(action, Drop):
        lifecycle.stopped(instance)
        return []
    lifecycle.draining(instance)
    return [Order("advance", action.instance_id, action.generation, action.node)]


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
