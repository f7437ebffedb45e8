"""What to do so that observed follows desired. Decides and touches nothing: reconcile.py reads the world and carries it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from models_app import backoff
from models_app.models import Cause, DrainReason, State
from models_app.models.instance import LIVE, WITH_PROCESS


@dataclass(frozen=True, slots=True)
class Desired:
    """One part of one model. replicas is how many processes of it there shall be now, 0 where the model is disabled.

    cause: why a new one would be there. may_surge: a replacement may run beside the process it takes over from.
    """

    model_id: int
    part: str
    replicas: int
    max_replicas: int
    digest: str
    cause: str = Cause.MINIMUM
    may_surge: bool = True


@dataclass(frozen=True, slots=True)
class Observed:
    """One instance that has not ended. model_id is None once the model is deleted.

    replaces: id of the outdated instance it takes over from. hold: why it waits for room. used_at: when it was last of use.
    makes_room: it drains, which may yet be called off.
    """

    instance_id: int
    generation: int
    model_id: int | None
    part: str
    node: str
    state: State
    digest: str
    next_attempt_at: datetime | None = None
    replaces: int | None = None
    hold: str = ""
    busy: bool = False
    used_at: datetime | None = None
    makes_room: bool = False


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
    """A new PENDING instance; replaces: the outdated one it takes over from."""

    model_id: int
    part: str
    node_id: int
    cause: str = Cause.MINIMUM
    replaces: int | None = None


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
    """READY → DRAINING, or for good where it only makes room; whoever carries it out orders `advance` on the node."""

    instance_id: int
    generation: int
    node: str
    reason: str = DrainReason.STOP


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

# Those that serve nobody first.
_LEAST_USEFUL_FIRST = (State.CRASH_LOOP, State.FAILED, State.PENDING, State.STARTING, State.READY)


@dataclass(slots=True)
class Placement:
    """Where new instances go: the node with the fewest, counted as the plan adds to them."""

    nodes: Sequence[NodeView]
    load: dict[str, int] = field(default_factory=dict)

    def choose(self, preferred: str = "") -> NodeView | None:
        """The preferred node where it is usable, else the one with the fewest; None where none is."""
        usable = [node for node in self.nodes if node.heard and not node.cordoned]
        if not usable:
            return None
        chosen = min(usable, key=lambda node: (node.name != preferred, self.load.get(node.name, 0), node.name))
        self.load[chosen.name] = self.load.get(chosen.name, 0) + 1
        return chosen


def plan(world: World, now: datetime) -> list[Action]:
    """What to do next. Planning again after its actions took effect leads to rest: no action but `advance`.

    Nodes that are not heard get no orders: nobody would carry them out, and their queue would only grow.
    """
    load: dict[str, int] = {}
    for one in world.instances:
        load[one.node] = load.get(one.node, 0) + 1
    placement = Placement(world.nodes, load)
    moving = (State.STARTING, State.DRAINING, State.STOPPING)
    actions: list[Action] = [_order("advance", one) for one in world.instances if one.state in moving]
    for model in world.models:
        own = [one for one in world.instances if (one.model_id, one.part) == (model.model_id, model.part)]
        actions += _plan_model(model, own, placement, now)
    wanted = {(model.model_id, model.part) for model in world.models}
    unwanted = (one for one in world.instances if (one.model_id, one.part) not in wanted)
    actions += [_end(one) for one in unwanted if one.state in LIVE or one.makes_room]
    heard = {node.name for node in world.nodes if node.heard}
    return [action for action in actions if not isinstance(action, Order) or action.node in heard]


def _order(do: Literal["start", "stop", "advance"], one: Observed) -> Order:
    return Order(do, one.instance_id, one.generation, one.node)


def _end(one: Observed, reason: str = DrainReason.STOP) -> Action:
    if one.state == State.READY or one.makes_room:
        return Drain(one.instance_id, one.generation, one.node, reason)
    return _order("stop", one) if one.state == State.STARTING else Drop(one.instance_id, one.generation)


def _outdated(model: Desired, one: Observed) -> bool:
    return one.state != State.PENDING and one.digest != model.digest


def _plan_model(model: Desired, own: Sequence[Observed], placement: Placement, now: datetime) -> list[Action]:
    taken_over = {one.replaces for one in own if one.state == State.READY}
    live = [one for one in own if one.state in LIVE]
    live.sort(key=lambda one: (*_usefulness(model, one), one.instance_id not in taken_over, *_use(one)))
    surge = _surge(model, live)
    counted = [one for one in live if one is not surge]
    surplus = max(0, len(counted) - model.replicas)
    going, staying = counted[:surplus], counted[surplus:]
    too_many = len(counted) - model.max_replicas
    return [
        *(_end(one, _why(model, one, number < too_many)) for number, one in enumerate(going)),
        *_create(model.replicas - len(counted), model, placement),
        *([] if going else _replace(model, own, staying, surge, placement)),
        *_start(model, own, [*staying, *([surge] if surge else [])], surge is not None and model.may_surge, now),
    ]


def _usefulness(model: Desired, one: Observed) -> tuple[int, bool]:
    """What serves nobody goes first, then the outdated …"""
    return _LEAST_USEFUL_FIRST.index(one.state), not _outdated(model, one)


def _use(one: Observed) -> tuple[bool, float, int]:
    """… then what is idle, what was not used for longest, and the newest."""
    return one.busy, one.used_at.timestamp() if one.used_at else 0.0, -one.instance_id


def _why(model: Desired, one: Observed, too_many: bool) -> str:
    """What is not needed now is only unloaded: where requests come back to it meanwhile it stays, and is looked at anew."""
    asked = too_many or (_outdated(model, one) and model.replicas > 0)
    return DrainReason.STOP if asked else DrainReason.EVICT


def _surge(model: Desired, live: Sequence[Observed]) -> Observed | None:
    """The one replacement that is on its way while the outdated process still serves: it does not count until it is READY."""
    replaced = {one.instance_id for one in live if _outdated(model, one) and one.state in (State.STARTING, State.READY)}
    coming = [one for one in live if one.replaces in replaced and one.state != State.READY]
    return min(coming, key=lambda one: one.instance_id) if model.replicas and coming else None


def _create(count: int, model: Desired, placement: Placement) -> list[Action]:
    nodes = [placement.choose() for _ in range(count)]
    return [Create(model.model_id, model.part, node.node_id, model.cause) for node in nodes if node is not None]


def _replace(
    model: Desired, own: Sequence[Observed], staying: Sequence[Observed], surge: Observed | None, placement: Placement
) -> list[Action]:
    """Instances launched with another specification: one at a time, and the next only when every new one is READY.

    The new process starts beside the old one, which serves until then; so a bad configuration takes down nothing. Where it
    cannot start beside it (a fixed port, no room) the old one goes first.
    """
    gone_wrong = [*staying, *([surge] if surge else [])]
    resets: list[Action] = [
        Reset(one.instance_id, one.generation)
        for one in gone_wrong
        if _outdated(model, one) and one.state in (State.FAILED, State.CRASH_LOOP)
    ]
    old = [one for one in staying if _outdated(model, one) and one.state in (State.STARTING, State.READY)]
    if surge is not None and _outdated(model, surge) and surge.state == State.STARTING:
        return [*resets, _end(surge)]
    if resets or not old:
        return resets
    if surge is not None:
        return _make_way(model, own, old, surge)
    if any(one.state != State.READY and not one.hold for one in own if one not in old):
        return []
    # One that is not ready serves nobody: it goes first.
    victim = min(old, key=lambda one: (one.state == State.READY, one.instance_id))
    node = placement.choose(victim.node)
    if node is None:
        return []
    created = Create(model.model_id, model.part, node.node_id, Cause.RESTART, victim.instance_id)
    beside = model.may_surge and victim.state == State.READY
    return [created] if beside else [created, _end(victim)]


def _make_way(model: Desired, own: Sequence[Observed], old: Sequence[Observed], surge: Observed) -> list[Action]:
    """End the process that is replaced before its replacement is READY: it serves nobody, or there is no room for both."""
    replaced = next((one for one in old if one.instance_id == surge.replaces), None)
    if replaced is None:
        return []
    if replaced.state == State.STARTING:
        return [_end(replaced)]
    blocked = surge.state == State.PENDING and (surge.hold or not model.may_surge)
    ending = any(one.state in (State.DRAINING, State.STOPPING) for one in own)
    return [_end(replaced)] if blocked and not ending else []


def _start(model: Desired, own: Sequence[Observed], staying: Sequence[Observed], surges: bool, now: datetime) -> list[Action]:
    """Start what waits, as far as max_replicas leaves room: a process that is still ending holds its memory and its port.

    A replacement that starts beside the process it takes over from may be one more.
    """
    room = model.max_replicas + surges - sum(one.state in WITH_PROCESS for one in own)
    due = [one for one in staying if one.state == State.PENDING or _retry_due(model, one, now)]
    return [_order("start", one) for one in due[: max(0, room)]]


def _retry_due(model: Desired, one: Observed, now: datetime) -> bool:
    return one.state == State.FAILED and not _outdated(model, one) and backoff.due(one.next_attempt_at, now)
