"""How many processes of one part of a model there shall be. Pure: no Django, no I/O, no clock.

`target` looks at one part at one moment; what it must know of earlier looks is Hysteresis, kept by whoever calls.

* never outside minimum and maximum; a disabled model has none;
* from nothing to one where somebody asks for it;
* one more where requests queue, or nearly all slots are taken, for PRESSED_S while every process is READY;
* one fewer, though never the last, where the load would fit easily into the rest for SLACK_S;
* an idle one goes after the idle time-out, unless the rest would then be too few; pinned models stay;
* what nobody can tell for sure is no reason to unload anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PRESSED_S = 10.0
SLACK_S = 60.0
FULL = 0.9  # share of the slots in use above which there are too few
ROOMY = 0.6  # share of the remaining slots up to which one process is one too many
# A condition counts as having held between two looks for so long at most: a clock that was set or rounds that did not take
# place must not make a moment's pressure an hour's.
LONGEST_STEP_S = 5.0

Cause = Literal["minimum", "demand", "scale"]


@dataclass(frozen=True, slots=True)
class Replica:
    """One process of the part that counts towards its replicas.

    idle_s: seconds since it was last of use, 0 while it works; None where it is not READY.
    for_requests: it waits to be started, and only because requests asked for it.
    """

    ready: bool
    slots: int = 1
    in_flight: int = 0
    idle_s: float | None = None
    for_requests: bool = False


@dataclass(frozen=True, slots=True)
class PartView:
    """One part of a model as it is wanted and as it is.

    queued counts requests that wait at the gateways. wanted: somebody waits, or asked lately, and found none READY.
    known: every gateway that may send to the part's processes has been heard.
    """

    min_replicas: int
    max_replicas: int
    replicas: Sequence[Replica] = ()
    enabled: bool = True
    idle_timeout_s: float = 0.0  # 0: never idle for too long
    pinned: bool = False
    queued: int = 0
    wanted: bool = False
    known: bool = True


@dataclass(frozen=True, slots=True)
class Hysteresis:
    """For how many seconds pressure and slack have been seen without interruption, None where they are not seen; and when
    that was noted, on the clock of the caller. Losing it starts the time anew, no more.
    """

    pressed_s: float | None = None
    slack_s: float | None = None
    at: float | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """How many processes there shall be, and why a new one is there.

    wanted: requests wait with none READY, so others may be unloaded for it; min_replicas alone unloads nobody.
    """

    replicas: int
    cause: Cause = "minimum"
    wanted: bool = False


@dataclass(frozen=True, slots=True)
class _Slots:
    """The READY processes of a part, and sums over them."""

    all: int
    fewest: int  # without the largest process
    busy: int
    replicas: Sequence[Replica]


def target(view: PartView, before: Hysteresis, now: float) -> tuple[Target, Hysteresis]:
    """What the part shall have now, and what to remember until the next look. now: seconds on any steady clock."""
    if not view.enabled:
        return Target(0), Hysteresis()
    slots = _slots(view)
    seen = _remember(view, slots, before, now)
    live = len(view.replicas)
    replicas = min(max(_moved(view, slots, seen), view.min_replicas), view.max_replicas)
    if replicas != live:
        seen = Hysteresis(at=now)
    return Target(replicas, _cause(view, replicas), view.wanted), seen


def _slots(view: PartView) -> _Slots:
    ready = [one for one in view.replicas if one.ready]
    sizes = [one.slots for one in ready]
    return _Slots(sum(sizes), sum(sizes) - max(sizes, default=0), sum(one.in_flight for one in ready), ready)


def _remember(view: PartView, slots: _Slots, before: Hysteresis, now: float) -> Hysteresis:
    step = 0.0 if before.at is None else min(max(0.0, now - before.at), LONGEST_STEP_S)

    def held(seen: bool, so_far: float | None) -> float | None:
        if not seen:
            return None
        return 0.0 if so_far is None else so_far + step

    return Hysteresis(held(_pressed(view, slots), before.pressed_s), held(_slack(view, slots), before.slack_s), now)


def _pressed(view: PartView, slots: _Slots) -> bool:
    """One more would help. While one is on its way, or one has failed, its outcome is awaited."""
    if not 0 < len(view.replicas) < view.max_replicas or len(slots.replicas) < len(view.replicas):
        return False
    return view.queued > 0 or slots.busy >= FULL * slots.all


def _slack(view: PartView, slots: _Slots) -> bool:
    """One fewer would do. One that is not READY goes first, so its going takes no slots away."""
    if not view.known or view.wanted or view.queued or len(view.replicas) <= max(view.min_replicas, 1):
        return False
    rest = slots.fewest if len(slots.replicas) == len(view.replicas) else slots.all
    return slots.busy <= ROOMY * rest


def _moved(view: PartView, slots: _Slots, seen: Hysteresis) -> int:
    """The number wanted, minimum and maximum aside."""
    live = len(view.replicas)
    if view.wanted and not live:
        return 1
    if seen.pressed_s is not None and seen.pressed_s >= PRESSED_S:
        return live + 1
    if unneeded := _unneeded(view, slots):
        return live - unneeded
    if seen.slack_s is not None and seen.slack_s >= SLACK_S:
        return live - 1
    return live


def _unneeded(view: PartView, slots: _Slots) -> int:
    """How many have been idle for too long, or have not even started while nobody asks for them any more."""
    if not view.known or view.wanted or view.queued:
        return 0
    forgotten = sum(one.for_requests for one in view.replicas if not one.ready)
    return forgotten if view.pinned or not view.idle_timeout_s else forgotten + _expired(view, slots)


def _expired(view: PartView, slots: _Slots) -> int:
    """Idle for too long, as far as those that stay would not have to be joined by another at once."""
    idle = [one for one in slots.replicas if not one.in_flight and one.idle_s is not None and one.idle_s >= view.idle_timeout_s]
    staying = slots.all - sum(one.slots for one in idle)
    going = len(idle)
    for one in idle:
        if not slots.busy or slots.busy < FULL * staying:
            break
        staying += one.slots
        going -= 1
    return going


def _cause(view: PartView, replicas: int) -> Cause:
    if replicas <= view.min_replicas:
        return "minimum"
    return "demand" if replicas == 1 else "scale"
