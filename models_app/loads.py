"""Loads: one row for each attempt to bring a replica up. `follow` derives them from instances; nothing else writes them.

Requests wait for what is published of them (contracts/coordination.py: LOADS), and later estimates are learned from them.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import psutil
from django.conf import settings
from django.utils import timezone

from models_app import coordination, launch_spec
from models_app.contracts.coordination import LOAD_LIFE_S, LOADS, LoadProgress, load_field
from models_app.exceptions import CoordinationUnavailable, PathNotAllowed
from models_app.models import Instance, Load, ModelConfig, State
from models_app.models.instance import LIVE
from models_app.process_identity import ProcessIdentity, alive
from models_app.scheduler import Target

log = logging.getLogger(__name__)

Stage = Load.Stage
PartKey = tuple[int, str]  # model id, part
LEARNED_FROM = 5  # earlier loads an expectation is the median of
ALMOST = 0.95  # progress says no more before it is READY
OVERDUE = 0.2  # share of the time so far that a load beyond its expectation is taken to need still
BEAT = timedelta(seconds=1)  # between two notes of a load's progress
KEPT = 200  # newest loads kept per model
WAITS_FOR = {"memory": "waits for memory", "node_full": "waits for room on its node"}  # by Instance.hold
NO_NODE = "No machine is ready to run it; an administrator should see that a worker runs and its node is not cordoned."


@dataclass(frozen=True, slots=True)
class Sight:
    """How far a load is at one moment. eta_s is None where nothing is known."""

    progress: float
    eta_s: float | None


def sight(elapsed_s: float, expected_s: float | None, memory: float | None) -> Sight:
    """elapsed_s since the process was started; memory: the share of what it is to need that it has taken, None where not
    known. One that takes longer than expected is taken to need the longer the longer it has taken: never a negative time.
    """
    elapsed_s = max(0.0, elapsed_s)
    share = elapsed_s / expected_s if expected_s else 0.0
    progress = min(ALMOST, max(share, memory or 0.0, 0.0))
    if expected_s is None:
        return Sight(progress, None)
    return Sight(progress, expected_s - elapsed_s if elapsed_s < expected_s else OVERDUE * elapsed_s)


def stage_of(generation: int, state: State, at: int, was_ready: bool) -> Stage:
    """Where the load of this generation stands, from its instance's state, present generation and whether that was ready."""
    if at == generation and was_ready:
        return Stage.READY
    if at < generation:
        waiting = {State.PENDING: Stage.WAITING, State.FAILED: Stage.FAILED, State.CRASH_LOOP: Stage.FAILED}
        return waiting.get(state, Stage.CANCELLED)
    if at == generation and state == State.STARTING:
        return Stage.LOADING
    ending = (State.DRAINING, State.STOPPING, State.STOPPED)
    return Stage.CANCELLED if at == generation and state in ending else Stage.FAILED


# One round


def follow(targets: Mapping[PartKey, Target], now: datetime | None = None) -> None:
    """Open, move, close and publish loads as instances are now; once a reconcile round, after its rows are written."""
    now = now or timezone.now()
    current = Instance.objects.current().select_related("node", "model").defer("exit_log", "engine_secret")
    instances = list(current.order_by("id"))
    for load in _under_way():
        _move(load, now)
    _open(instances)
    under_way = _under_way()
    for load in under_way:
        _beat(load, now)
    _publish({**_missing(targets, instances, now), **_retries(instances, now), **_progress(under_way, now)})


def _under_way() -> list[Load]:
    found = Load.objects.filter(ended_at__isnull=True).select_related("instance__node").order_by("id")
    return list(found.defer("instance__exit_log", "instance__engine_secret"))


def _move(load: Load, now: datetime) -> None:
    """Bring one open load to where its instance is."""
    instance = load.instance
    if instance is None:
        _write(load, stage=Stage.CANCELLED, ended_at=now, detail="Its instance is gone.")
        return
    was_ready = instance.ready_at is not None
    stage = stage_of(load.generation, State(instance.state), instance.generation, was_ready)
    if stage == Stage.WAITING:
        if (load.detail, load.cause) != (instance.hold_reason, instance.cause):
            _write(load, detail=instance.hold_reason, cause=instance.cause)
    elif stage == Stage.LOADING:
        if load.stage != Stage.LOADING:
            _write(load, stage=stage, detail="", **_started(load, instance))
    else:
        _end(load, instance, stage, now)


def _started(load: Load, instance: Instance) -> dict[str, object]:
    same = load.launch_digest == instance.launch_digest
    expected = load.expected_s if same else _expected_s(instance, instance.launch_digest)
    return {"started_at": instance.started_at, "launch_digest": instance.launch_digest, "expected_s": expected}


def _end(load: Load, instance: Instance, stage: Stage, now: datetime) -> None:
    changes: dict[str, object] = {"stage": stage, "detail": "" if stage == Stage.READY else instance.exit_reason}
    if stage == Stage.READY:
        changes |= {"ended_at": instance.ready_at, "progress": 1.0}
    else:
        changes |= {"ended_at": now}
    if load.started_at is None and instance.generation == load.generation:
        changes |= _started(load, instance)  # all of it happened between two rounds
    _write(load, **changes)
    _prune(load.model_name)


def _write(load: Load, **changes: object) -> None:
    """Change a load that is still open, in the row and in hand."""
    Load.objects.filter(pk=load.pk, ended_at__isnull=True).update(**changes)
    for name, value in changes.items():
        setattr(load, name, value)


def _prune(model_name: str) -> None:
    old = list(Load.objects.filter(model_name=model_name).order_by("-id").values_list("pk", flat=True)[KEPT : KEPT + 1000])
    if old:
        Load.objects.filter(pk__in=old, ended_at__isnull=False).delete()


def _open(instances: Iterable[Instance]) -> None:
    """A load for every instance on its way up that has none."""
    on_the_way = [one for one in instances if one.state in (State.PENDING, State.STARTING)]
    have = set(Load.objects.filter(ended_at__isnull=True).values_list("instance_id", flat=True)) if on_the_way else set()
    # One that another round opened meanwhile is left as it is: the database allows one open load per instance.
    Load.objects.bulk_create([_new(one) for one in on_the_way if one.pk not in have], ignore_conflicts=True)


def _new(instance: Instance) -> Load:
    starting = instance.state == State.STARTING
    digest = instance.launch_digest if starting or instance.model is None else launch_spec.digest(instance.model, instance.part)
    return Load(
        model_id=instance.model_id,
        model_name=instance.model_name,
        part=instance.part,
        node_id=instance.node_id,
        instance=instance,
        generation=instance.generation if starting else instance.generation + 1,
        launch_digest=digest,
        cause=instance.cause,
        stage=Stage.LOADING if starting else Stage.WAITING,
        detail="" if starting else instance.hold_reason,
        expected_s=_expected_s(instance, digest),
        started_at=instance.started_at if starting else None,
    )


# What earlier loads tell


def _expected_s(instance: Instance, digest: str) -> float | None:
    """Median of the last loads of this part: with this very launch here, else of any launch here, else anywhere; else by
    the size of its files at the pace other models load here; None where nothing was ever loaded here.
    """
    ended = Load.objects.filter(model_name=instance.model_name, part=instance.part, stage=Stage.READY)
    here = ended.filter(node_id=instance.node_id)
    for alike in (here.filter(launch_digest=digest), here, ended):
        lasted = _seconds(alike.order_by("-id").values_list("started_at", "ended_at")[:LEARNED_FROM])
        if lasted:
            return statistics.median(lasted)
    return _by_size(instance)


def _seconds(times: Iterable[tuple[datetime | None, datetime | None]]) -> list[float]:
    """Lengths; those that make no sense, for the clock was set meanwhile, are left out."""
    lasted = [(end - start).total_seconds() for start, end in times if start is not None and end is not None]
    return [one for one in lasted if one > 0]


def _by_size(instance: Instance) -> float | None:
    if instance.node.name != settings.ASSISTANT_NODE or instance.model is None:
        return None  # another machine's files
    weights = _weights(instance.model, instance.part)
    ended = Load.objects.filter(node_id=instance.node_id, stage=Stage.READY, model__isnull=False).select_related("model")
    paces = []
    for load in ended.order_by("-id")[:LEARNED_FROM]:
        lasted = _seconds([(load.started_at, load.ended_at)])
        size = _weights(load.model, load.part) if load.model else None
        if lasted and size:
            paces.append(size / lasted[0])
    return weights / statistics.median(paces) if weights and paces else None


def _weights(model: ModelConfig, part: str) -> int | None:
    """Bytes of the files a process of this part loads, None where they cannot be seen."""
    try:
        spec = launch_spec.model_spec(model, part)
        paths = (spec.chat_model_path, spec.embedding_model_path, spec.tts_model_path)
        return sum(path.stat().st_size for path in paths if path is not None)
    except (PathNotAllowed, OSError):
        return None


# Progress


def look(instance: Instance, now: datetime | None = None) -> None:
    """Note and publish how far a STARTING instance of this node is, once a BEAT; nothing where it has no load yet."""
    now = now or timezone.now()
    load = Load.objects.filter(instance_id=instance.pk, ended_at__isnull=True).first()
    if load is None or (load.stage == Stage.LOADING and not _due(load, now)):
        return
    load.instance = instance
    _move(load, now)
    if load.ended_at is not None:
        return
    _beat(load, now)
    try:
        field, life_ms = load_field(load.model_name, load.part), int(LOAD_LIFE_S * 1000)
        coordination.set_in_hash(LOADS, field, _published(load, now), life_ms)
    except CoordinationUnavailable as error:
        log.debug("Progress of %s not published: %s", load, error)


def _beat(load: Load, now: datetime) -> None:
    """Somebody looks after it; its progress never falls."""
    if _due(load, now):
        _write(load, heartbeat_at=now, progress=max(load.progress, _sight(load, now).progress))


def _due(load: Load, now: datetime) -> bool:
    return load.heartbeat_at is None or abs(now - load.heartbeat_at) >= BEAT


def _sight(load: Load, now: datetime) -> Sight:
    if load.stage != Stage.LOADING or load.started_at is None:
        return Sight(0.0, load.expected_s if not load.detail else None)
    memory = None if load.instance is None else _memory_share(load.instance)
    return sight((now - load.started_at).total_seconds(), load.expected_s, memory)


def _memory_share(instance: Instance) -> float | None:
    """How much of what it is to need its process has; another machine's cannot be seen."""
    if instance.node.name != settings.ASSISTANT_NODE or not instance.memory_bytes:
        return None
    if instance.pid is None or instance.start_ticks is None:
        return None
    if not alive(ProcessIdentity(instance.boot_id, instance.pid, instance.start_ticks)):
        return None
    try:
        return float(psutil.Process(instance.pid).memory_info().rss / instance.memory_bytes)
    except psutil.Error:
        return None


def _published(load: Load, now: datetime) -> LoadProgress:
    seen = _sight(load, now)
    loading = load.stage == Stage.LOADING
    return {
        "state": "loading" if loading else "waiting",
        "progress": round(max(load.progress, seen.progress) if loading else 0.0, 3),
        "eta_s": None if seen.eta_s is None else round(seen.eta_s, 1),
        "detail": load.detail,
        "at": now.timestamp(),
    }


def _progress(under_way: Iterable[Load], now: datetime) -> dict[str, LoadProgress]:
    """What whoever waits for a part waits for: of several loads the one that is furthest."""
    found: dict[str, LoadProgress] = {}
    for load in under_way:
        field, said = load_field(load.model_name, load.part), _published(load, now)
        before = found.get(field)
        if before is None or _far(said) > _far(before):
            found[field] = said
    return found


def _far(said: LoadProgress) -> tuple[bool, float]:
    return said["state"] == "loading", said["progress"]


def _retries(instances: Iterable[Instance], now: datetime) -> dict[str, LoadProgress]:
    """Parts whose last try failed and will be repeated."""
    found = {}
    for one in instances:
        if one.state == State.FAILED and one.next_attempt_at is not None:
            in_s = max(0.0, (one.next_attempt_at - now).total_seconds())
            detail = f"The last start failed; the next is tried in {in_s:.0f} s."
            found[load_field(one.model_name, one.part)] = _waits(detail, now)
    return found


def _missing(targets: Mapping[PartKey, Target], instances: Iterable[Instance], now: datetime) -> dict[str, LoadProgress]:
    """Parts that shall have a process for which no node was found."""
    there = {(one.model_id, one.part) for one in instances if one.state in LIVE}
    without = [key for key, target in targets.items() if target.replicas and key not in there]
    if not without:
        return {}
    names = dict(ModelConfig.objects.filter(pk__in={model_id for model_id, _ in without}).values_list("pk", "name"))
    return {load_field(names[pk], part): _waits(NO_NODE, now) for pk, part in without if pk in names}


def _waits(detail: str, now: datetime) -> LoadProgress:
    return {"state": "waiting", "progress": 0.0, "eta_s": None, "detail": detail, "at": now.timestamp()}


def _publish(said: Mapping[str, LoadProgress]) -> None:
    try:
        coordination.replace_hash(LOADS, said, int(LOAD_LIFE_S * 1000))
    except CoordinationUnavailable as error:
        log.debug("Loads not published: %s", error)


# For people


def current(model_id: int) -> list[Load]:
    """Loads of a model under way now, oldest first."""
    return list(Load.objects.filter(model_id=model_id, ended_at__isnull=True).order_by("id"))


def eta_s(load: Load, now: datetime | None = None) -> float | None:
    """Seconds until it should be READY; None where nothing is known, where it waits for something, and once it has ended."""
    if load.ended_at is not None or load.detail:
        return None
    if load.started_at is None:
        return load.expected_s
    return sight(((now or timezone.now()) - load.started_at).total_seconds(), load.expected_s, None).eta_s


def in_words(load: Load, now: datetime | None = None, hold: str = "") -> str:
    """“loading 40 %, about 12 s”, “waits for memory: …”; of one that has ended, how it ended. hold: its instance's."""
    if load.stage == Stage.WAITING:
        return f"{WAITS_FOR.get(hold, 'waits')}: {load.detail}" if load.detail else "waits to be started"
    if load.stage != Stage.LOADING or load.started_at is None:
        return load.detail or load.stage
    elapsed = ((now or timezone.now()) - load.started_at).total_seconds()
    seen = sight(elapsed, load.expected_s, None)
    share = f"loading {max(load.progress, seen.progress):.0%}".replace("%", " %")
    if seen.eta_s is None:
        return share
    overdue = load.expected_s is not None and elapsed >= load.expected_s
    return f"{share}, longer than usual" if overdue else f"{share}, about {max(1.0, seen.eta_s):.0f} s"
