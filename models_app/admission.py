"""May this process be started with the memory this node has, and what would have to go for it? Pure: numbers in, a verdict out.

Memory is counted in two kinds. *Private* bytes belong to one process: context, buffers, the program itself. *File* bytes are the
mapped pages of a model file: every process that maps the file shares them, so they count once per node. The kernel calls file
pages available, mapped or not, because it could drop them; an engine whose weights are dropped reads them from disk for every
token. So what residents map is taken off what the kernel calls available.

A resident claims what it is expected to need. What it does not hold yet (it loads, or has not filled its caches) is reserved.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from models_app.memory_text import idle_text, size_text

READY = "READY"


@dataclass(frozen=True, slots=True)
class Claim:
    """What one process needs, in bytes; files: weights by path, as far as they are mapped into host memory."""

    private: int
    files: Mapping[str, int] = field(default_factory=dict)
    gpu: int = 0

    @property
    def host(self) -> int:
        return self.private + sum(self.files.values())


@dataclass(frozen=True, slots=True)
class Memory:
    """What a node has, in bytes.

    available: what the kernel and the control group would still give. limit: cap of all engines together, None without one.
    gpu_free: of all GPUs together, which llama.cpp divides a model over.
    """

    available: int
    limit: int | None = None
    gpu_free: int = 0


@dataclass(frozen=True, slots=True)
class Resident:
    """One process that exists on the node.

    private_now, gpu_now: bytes it holds already. idle_s: since its last request ended; None where nobody knows, which is not
    idle. going: it is being stopped, so its memory will come back by itself.
    """

    instance_id: int
    generation: int
    model_name: str
    part: str
    claim: Claim
    private_now: int
    gpu_now: int = 0
    state: str = READY
    idle_s: float | None = None
    busy: bool = False
    just_loaded: bool = False
    pinned: bool = False
    priority: int = 0

    @property
    def going(self) -> bool:
        return self.state in ("DRAINING", "STOPPING")

    @property
    def evictable(self) -> bool:
        """It may be unloaded now without harm to anybody."""
        return self.state == READY and self.idle_s is not None and not (self.busy or self.just_loaded or self.pinned)

    def describe(self) -> str:
        """The model with why it is, or is not, ready to go."""
        if self.going:
            return f"{self.model_name} (being unloaded)"
        if self.pinned:
            return f"{self.model_name} (pinned)"
        if self.busy or (self.idle_s is None and self.state == READY):
            return f"{self.model_name} (busy)"
        if self.state != READY:
            return f"{self.model_name} (loading)"
        return f"{self.model_name} ({'just loaded' if self.just_loaded else idle_text(self.idle_s or 0.0)})"


class Kind(enum.StrEnum):
    FITS = "fits"
    FITS_AFTER = "fits_after"  # once the victims are unloaded
    WAITS = "waits"  # until others end or may be unloaded
    NEVER = "never"  # not even with everything unpinned gone


@dataclass(frozen=True, slots=True)
class Verdict:
    """needs and free speak of the memory that is short: host, or GPU where only that is. largest_ctx: ctx_size that would fit."""

    kind: Kind
    sentence: str
    needs_bytes: int
    free_bytes: int
    victims: tuple[Resident, ...] = ()
    largest_ctx: int | None = None


# From (host bytes for the process alone, GPU bytes) to the largest ctx_size it could have, None where none is small enough.
LargestCtx = Callable[[int, int], int | None]


@dataclass(frozen=True, slots=True)
class Room:
    """What would be free for a claim, and what the claim needs of it: shared files are counted as there already."""

    host_free: int
    gpu_free: int
    host_needs: int
    gpu_needs: int

    @property
    def enough(self) -> bool:
        return self.host_needs <= self.host_free and self.gpu_needs <= self.gpu_free

    @property
    def short(self) -> tuple[int, int]:
        """(needs, free) of the memory that is lacking; of the host where none is."""
        if self.host_needs <= self.host_free and self.gpu_needs > self.gpu_free:
            return self.gpu_needs, self.gpu_free
        return self.host_needs, self.host_free


def room_without(claim: Claim, memory: Memory, residents: Iterable[Resident], gone: Collection[Resident] = ()) -> Room:
    """The room for this claim once these residents are gone."""
    gone_ids = {one.instance_id for one in gone}
    free, gpu_free = memory.available, memory.gpu_free
    claimed_private = 0
    files: dict[str, int] = {}
    for one in residents:
        if one.instance_id in gone_ids:
            free += one.private_now
            gpu_free += one.gpu_now
            continue
        free -= max(0, one.claim.private - one.private_now)
        gpu_free -= max(0, one.claim.gpu - one.gpu_now)
        claimed_private += max(one.claim.private, one.private_now)
        for path, size in one.claim.files.items():
            files[path] = max(size, files.get(path, 0))
    mapped = sum(files.values())
    free -= mapped
    if memory.limit is not None:
        free = min(free, memory.limit - claimed_private - mapped)
    more_files = sum(max(0, size - files.get(path, 0)) for path, size in claim.files.items())
    return Room(max(0, free), max(0, gpu_free), claim.private + more_files, claim.gpu)


def judge(
    claim: Claim, memory: Memory, residents: Sequence[Resident], *, may_evict: bool, largest_ctx: LargestCtx | None = None
) -> Verdict:
    """Whether it fits, after what, or why not. Victims are idle, unpinned, READY and not just loaded: the fewest of the lowest
    priority and least recent use that make room, none of them without need.
    """
    now = room_without(claim, memory, residents)
    if now.enough:
        return Verdict(Kind.FITS, "It fits.", *now.short)
    victims = choose_victims(claim, memory, residents) if may_evict else ()
    if victims:
        names = " and ".join(one.describe() for one in victims)
        return Verdict(Kind.FITS_AFTER, f"It fits after unloading {names}.", *now.short, victims)
    best = room_without(claim, memory, residents, [one for one in residents if not one.pinned])
    if best.enough:
        return _waits(claim, memory, residents, may_evict)
    return _never(best, residents, claim, largest_ctx)


def eviction_order(residents: Iterable[Resident]) -> list[Resident]:
    """Those that may go, first to go first."""
    going = [one for one in residents if one.evictable]
    return sorted(going, key=lambda one: (one.priority, -(one.idle_s or 0.0), one.instance_id))


def choose_victims(claim: Claim, memory: Memory, residents: Sequence[Resident]) -> tuple[Resident, ...]:
    """In eviction order; empty where not even all of them make room."""
    return _smallest(claim, memory, residents, eviction_order(residents))


def _smallest(
    claim: Claim, memory: Memory, residents: Sequence[Resident], candidates: Sequence[Resident]
) -> tuple[Resident, ...]:
    """The shortest beginning of the candidates that makes room, without the members that turn out unnecessary."""
    chosen: list[Resident] = []
    for one in candidates:
        chosen.append(one)
        if room_without(claim, memory, residents, chosen).enough:
            break
    else:
        return ()
    for one in reversed(tuple(chosen)):
        others = [other for other in chosen if other is not one]
        if room_without(claim, memory, residents, others).enough:
            chosen = others
    return tuple(chosen)


def _waits(claim: Claim, memory: Memory, residents: Sequence[Resident], may_evict: bool) -> Verdict:
    """It would fit if others ended: say which. Those that go by themselves come first, then idle ones, then the rest."""
    others = [one for one in residents if not one.pinned]
    others.sort(key=lambda one: (not one.going, not one.evictable, one.priority, -(one.idle_s or 0.0), one.instance_id))
    awaited = _smallest(claim, memory, residents, others)
    short = room_without(claim, memory, residents, [one for one in awaited if may_evict and one.evictable]).short
    names = " and ".join(one.describe() for one in awaited)
    sentence = f"It waits for memory: needs {size_text(short[0])}, free {size_text(short[1])}; in the way: {names}."
    return Verdict(Kind.WAITS, sentence, *short)


def _never(best: Room, residents: Sequence[Resident], claim: Claim, largest_ctx: LargestCtx | None) -> Verdict:
    needs, free = best.short
    which = "GPU memory" if (needs, free) == (best.gpu_needs, best.gpu_free) and best.host_needs <= best.host_free else "memory"
    shared = claim.host - best.host_needs  # files that pinned residents map are there already
    ctx = largest_ctx(best.host_free + shared, best.gpu_free) if largest_ctx else None
    pinned = sorted({one.model_name for one in residents if one.pinned})
    beside = f" beside {' and '.join(pinned)} (pinned)" if pinned else ""
    remedy = f"fits with ctx_size ≤ {ctx}" if ctx else "no context size is small enough; choose a smaller model or another node"
    sentence = f"It does not fit{beside}: needs {size_text(needs)} of {which}, free {size_text(free)}; {remedy}."
    return Verdict(Kind.NEVER, sentence, needs, free, largest_ctx=ctx)
