"""May an instance start on this node now? The effects of admission: who waits, who is unloaded for it, who makes room.

Looked at right before the spawn, under a lock of the node, so that two starts never count the same free memory. What is
claimed is reserved in the row (memory_bytes) before the lock is given back; nothing is held while an engine loads.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from django.conf import settings
from django.db.models import Q
from django.utils import timezone

from models_app import admission, fit, lifecycle, scheduling
from models_app.admission import Kind
from models_app.engines.base import ModelSpec
from models_app.exceptions import StaleTransition
from models_app.models import Cause, DrainReason, Instance, ModelConfig, State
from models_app.models.instance import InstanceQuerySet

log = logging.getLogger(__name__)

LOCK = ".admission"
LOCK_WAIT_S = 5.0  # many times what an admission takes
STARVED = timedelta(seconds=30)  # wanted and held back for so long: busy ones make room
SETTLED = timedelta(seconds=10)  # READY for so short a time: just loaded, so it stays
FREED = timedelta(seconds=10)  # what an unload has freed belongs so long to whoever has waited longest
MEMORY = "memory"
NODE_FULL = "node_full"
_MAKES_ROOM = (DrainReason.EVICT, DrainReason.YIELD)


@dataclass(frozen=True, slots=True)
class Answer:
    """hold empty: start now, with needs_bytes reserved. Else wait, and unload the victims meanwhile. never: it will not fit."""

    sentence: str = ""
    needs_bytes: int | None = None
    free_bytes: int = 0
    hold: str = ""
    never: bool = False
    victims: Sequence[int] = ()  # instance ids
    wanted: bool = False


@contextmanager
def alone() -> Iterator[bool]:
    """Whether this is the only admission on this node; waits a moment for that. False: somebody else must do it, later.

    A lock of the file system: it is the node's own, and a worker that dies gives it back.
    """
    folder = Path(settings.ASSISTANT_INSTANCES_DIR)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        until = time.monotonic() + LOCK_WAIT_S
        while not (locked := _lock(file)) and time.monotonic() < until:
            time.sleep(0.02)
        yield locked


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def ask(instance: Instance, config: ModelConfig, spec: ModelSpec) -> Answer:
    """Whether it may start now. Call it inside alone()."""
    seen = scheduling.traffic()
    wanted = any(queue["wanted"] for queue in seen.of_part(config.name, instance.part))
    # What ends already may be enough: only when it has gone is anything more unloaded.
    may_evict = (wanted or instance.cause == Cause.MANUAL) and not _ending(instance)
    found = _node_full(instance, may_evict) or _memory(instance, config, spec, may_evict)
    if not found.hold and not found.never:
        found = _after_its_turn(instance, found)
    found = replace(found, wanted=wanted)
    if found.hold and wanted and not found.victims and _starved(instance):
        found = _with_yield(instance, config, found)
    return found


def _others(instance: Instance) -> list[Instance]:
    """Everything else on its node that has a process, or waits for room with requests behind it."""
    here = Instance.objects.current().filter(node_id=instance.node_id).exclude(pk=instance.pk)
    return list(here.select_related("model").defer("exit_log", "engine_secret"))


def _ending(instance: Instance) -> bool:
    """Something on its node ends soon by itself. A yield that takes longer stops nobody else from being unloaded."""
    here = Instance.objects.filter(node_id=instance.node_id)
    if here.filter(state=State.STOPPING).exists():
        return True
    before = timezone.now() - timedelta(seconds=lifecycle.EVICT_GRACE_S)
    lasting = Q(drain_reason=DrainReason.YIELD, state_changed_at__lt=before)
    return here.filter(state=State.DRAINING).exclude(lasting).exists()


def _after_its_turn(instance: Instance, found: Answer) -> Answer:
    """It could start; but room that is being made, or was made just now, belongs to whoever has been wanted for longest."""
    here = Instance.objects.filter(node_id=instance.node_id)
    made = here.filter(drain_reason__in=_MAKES_ROOM)
    coming = list(made.filter(state__in=(State.DRAINING, State.STOPPING)).only("memory_bytes"))
    if not coming and not made.filter(state=State.STOPPED, state_changed_at__gte=timezone.now() - FREED).exists():
        return found
    first = _longest_wanted(instance, here)
    if first is None:
        return found
    left = found.free_bytes - (found.needs_bytes or 0) + sum(one.memory_bytes or 0 for one in coming)
    if first.hold == MEMORY and left >= (first.memory_bytes or 0):
        return found
    sentence = f"It waits its turn: room is being made for {first.model_name}, for which requests have waited longer."
    return replace(found, sentence=sentence, hold=first.hold)


def _longest_wanted(instance: Instance, here: InstanceQuerySet) -> Instance | None:
    """Who waits for room with requests behind it, and for longer than this one."""
    waiting = here.filter(state=State.PENDING, wanted_since__isnull=False).exclude(pk=instance.pk).exclude(hold="")
    if instance.wanted_since is not None:
        waiting = waiting.filter(wanted_since__lt=instance.wanted_since)
    return waiting.order_by("wanted_since", "pk").first()


def _node_full(instance: Instance, may_evict: bool) -> Answer | None:
    """The node runs as many processes as it may: one that is idle goes, by the rules of memory."""
    most = instance.node.max_instances
    if most is None:
        return None
    running = Instance.objects.with_process().filter(node_id=instance.node_id).exclude(pk=instance.pk).count()
    if running < most:
        return None
    sentence = f"Node {instance.node.name} runs {running} processes and may run {most} (max_instances)."
    idle = admission.eviction_order(fit.residents(instance.node.name)) if may_evict else []
    victims = [one.instance_id for one in idle if one.instance_id != instance.pk][: running - most + 1]
    if victims and len(victims) > running - most:
        return Answer(f"{sentence} It starts after unloading {_names(victims)}.", hold=NODE_FULL, victims=victims)
    return Answer(f"{sentence} It waits until one of them ends.", hold=NODE_FULL)


def _names(instances: Sequence[int]) -> str:
    names = Instance.objects.filter(pk__in=instances).order_by("pk").values_list("model_name", flat=True)
    return " and ".join(names)


def _memory(instance: Instance, config: ModelConfig, spec: ModelSpec, may_evict: bool) -> Answer:
    verdict = fit.admit(instance, config, spec, may_evict)
    if verdict.kind == Kind.FITS:
        return Answer(verdict.sentence, verdict.needs_bytes, verdict.free_bytes)
    victims = [one.instance_id for one in verdict.victims]
    if verdict.kind == Kind.NEVER and not _fits_in_place(instance, verdict.needs_bytes - verdict.free_bytes):
        return Answer(verdict.sentence, verdict.needs_bytes, never=True)
    return Answer(verdict.sentence, verdict.needs_bytes, verdict.free_bytes, MEMORY, victims=victims)


def _fits_in_place(instance: Instance, lacking: int) -> bool:
    """It takes over from a process that will have gone by then, although that one is pinned."""
    old = instance.replaces
    return old is not None and old.state in (State.READY, State.DRAINING, State.STOPPING) and (old.memory_bytes or 0) >= lacking


def _starved(instance: Instance) -> bool:
    return instance.wanted_since is not None and timezone.now() - instance.wanted_since >= STARVED


def _with_yield(instance: Instance, config: ModelConfig, found: Answer) -> Answer:
    """Nobody is idle, so whoever was loaded least recently ends its requests and goes.

    One that could not in its time serves on, and is asked again after all others.
    """
    others = _others(instance)
    if any(one.state in (State.DRAINING, State.STOPPING) for one in others):
        return found
    yielding = [one for one in others if one.state == State.READY and _may_yield(one, config, instance.part)]
    if not yielding:
        return found
    chosen = min(yielding, key=lambda one: (one.state_changed_at, one.pk))
    try:
        lifecycle.draining(chosen, DrainReason.YIELD, f"Made room for {config.name}, for which requests had waited long.")
    except StaleTransition as error:
        log.info("Overtaken: %s", error)
        return found
    log.info("%s makes room for %s once its requests have ended", chosen, instance)
    told = f"{found.sentence} {chosen.model_name} makes room once its running requests have ended."
    return replace(found, sentence=told)


def _may_yield(one: Instance, config: ModelConfig, part: str) -> bool:
    if one.model is None or (one.model_id, one.part) == (config.pk, part):
        return False
    settled = one.ready_at is not None and timezone.now() - one.ready_at >= SETTLED
    return settled and not one.model.pinned and one.model.priority <= config.priority


def _manner(instance: Instance, victim: Instance) -> DrainReason:
    """How an idle one goes. For whoever is starved it does not come back for each request that is made meanwhile, or one that
    is asked for every other second would never go.
    """
    config = instance.model
    yields = _starved(instance) and config is not None and _may_yield(victim, config, instance.part)
    return DrainReason.YIELD if yields else DrainReason.EVICT


def hold_back(instance: Instance, answer: Answer) -> None:
    """Say why it waits, and let those that are unloaded for it drain."""
    if instance.hold != answer.hold:
        log.info("%s waits: %s", instance, answer.sentence)
    lifecycle.held(instance, answer.hold, answer.sentence, answer.wanted, answer.needs_bytes)
    for victim in Instance.objects.filter(pk__in=answer.victims, state=State.READY).select_related("node", "model"):
        try:
            lifecycle.draining(victim, _manner(instance, victim), f"Unloaded to make room for {instance.model_name}.")
            log.info("%s is unloaded to make room for %s", victim, instance)
        except StaleTransition as error:
            log.info("Overtaken: %s", error)
