"""Does a model fit into this node's memory? Gathers need, memory and residents for models_app/admission.py to judge.

Speaks of the node it runs on: nobody else can read its processes' memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import psutil
from django.conf import settings
from django.utils import timezone

from models_app import admission, engine_memory, launch_spec, memory_estimate, node_memory, scheduling
from models_app.admission import Claim, LargestCtx, Memory, Resident, Verdict
from models_app.contracts.traits import WHOLE
from models_app.engines.base import ModelSpec
from models_app.exceptions import PreflightError
from models_app.memory_estimate import Need
from models_app.models import Instance, ModelConfig, Node, State
from models_app.process_identity import ProcessIdentity, alive

# Seconds a process stays once it is READY: until its first request has had time to come, and afterwards as long as the load
# took, so that models taking turns spend no more than half of the time on loading.
UNUSED_STAY_S = 10.0
LEAST_STAY_S, LONGEST_STAY_S = 2.0, 30.0
RUNS_REMEMBERED = 5  # whose measured peaks count


@dataclass(frozen=True, slots=True)
class PartFit:
    """What one process of a part needs, and how many are kept running."""

    part: str
    processes: int
    need: Need


@dataclass(frozen=True, slots=True)
class FitReport:
    """The verdict on all processes a model keeps running, together, with its own present ones out of the way."""

    node_name: str
    verdict: Verdict
    parts: tuple[PartFit, ...]


def judge_model(config: ModelConfig) -> FitReport:
    """Would this model fit here, as it is configured (saved or not)? Raises PreflightError where a file cannot be judged."""
    processes = max(1, config.min_replicas)
    specs = [launch_spec.model_spec(config, part) for part in config.parts]
    parts = tuple(PartFit(spec.part, processes, _need(config, spec)) for spec in specs)
    everyone = residents(settings.ASSISTANT_NODE)
    own_ids = set(Instance.objects.filter(model_id=config.pk).values_list("pk", flat=True)) if config.pk else set()
    own = [one for one in everyone if one.instance_id in own_ids]
    others = [one for one in everyone if one.instance_id not in own_ids]
    free = memory(settings.ASSISTANT_NODE)
    free = replace(
        free,
        available=free.available + sum(one.private_now for one in own),
        gpu_free=free.gpu_free + sum(one.gpu_now for one in own),
    )
    verdict = admission.judge(
        _together(parts), free, others, may_evict=True, largest_ctx=_largest_ctx(config.engine, specs, processes)
    )
    return FitReport(settings.ASSISTANT_NODE, verdict, parts)


def admit(instance: Instance, config: ModelConfig, spec: ModelSpec, may_evict: bool) -> Verdict:
    """May this instance, which has no process, start now? Raises PreflightError where its file cannot be judged."""
    claim = claim_of(_need(config, spec))
    others = [one for one in residents(instance.node.name) if one.instance_id != instance.pk]
    return admission.judge(
        claim, memory(instance.node.name), others, may_evict=may_evict, largest_ctx=_largest_ctx(config.engine, [spec], 1)
    )


def need_of(config: ModelConfig, part: str) -> Need:
    """What one process of this part needs, earlier runs considered. Raises PreflightError."""
    return _need(config, launch_spec.model_spec(config, part))


def claim_of(need: Need) -> Claim:
    return Claim(need.private, need.files, need.gpu)


def memory(node_name: str) -> Memory:
    """What this node has free now, and its cap for engines."""
    limit = Node.objects.filter(name=node_name).values_list("memory_limit_bytes", flat=True).first()
    return Memory(node_memory.host_memory().available, limit, sum(gpu.free for gpu in node_memory.gpus()))


def residents(node_name: str) -> list[Resident]:
    """Every process of the node, with what it claims, holds, and is used for."""
    rows = Instance.objects.with_process().filter(node__name=node_name).select_related("model")
    seen, now = scheduling.traffic(), timezone.now()
    on_gpu = node_memory.gpu_bytes_by_pid() if node_memory.gpus() else {}
    return [_resident(row, seen, now, on_gpu) for row in rows.defer("exit_log", "engine_secret")]


def _resident(row: Instance, seen: scheduling.Traffic, now: datetime, on_gpu: dict[int, int]) -> Resident:
    use = scheduling.use_of(row, seen, now)
    queued = any(part["queued"] for part in seen.of_part(row.model_name, row.part))
    private_now = _private_bytes(row)
    return Resident(
        instance_id=row.pk,
        generation=row.generation,
        model_name=row.model_name,
        part=row.part,
        claim=_claim_of_row(row, private_now),
        private_now=private_now,
        gpu_now=on_gpu.get(row.pid or 0, 0),
        state=row.state,
        idle_s=use.idle_s(now),
        busy=bool(use.in_flight) or queued,
        just_loaded=row.state == State.READY and _just_loaded(row, use, now),
        pinned=bool(row.model and row.model.pinned),
        priority=row.model.priority if row.model else 0,
    )


def _just_loaded(row: Instance, use: scheduling.Use, now: datetime) -> bool:
    if row.ready_at is None:
        return True
    used = use.last_at is not None and use.last_at > row.ready_at
    load_s = (row.ready_at - row.started_at).total_seconds() if row.started_at else 0.0
    stay_s = min(max(load_s, LEAST_STAY_S), LONGEST_STAY_S) if used else UNUSED_STAY_S
    return 0.0 <= (now - row.ready_at).total_seconds() < stay_s  # below 0: the clock was set back


def _private_bytes(row: Instance) -> int:
    """What the engine holds beyond file pages; 0 where there is no such process."""
    if row.pid is None or row.start_ticks is None or not alive(ProcessIdentity(row.boot_id, row.pid, row.start_ticks)):
        return 0
    try:
        used = psutil.Process(row.pid).memory_info()
    except psutil.Error:
        return 0
    return max(0, used.rss - used.shared)


def _claim_of_row(row: Instance, private_now: int) -> Claim:
    """By the settings it was launched with: its model may have been changed since. Where its file is gone, what was reserved."""
    try:
        config = _as_launched(row)
        return claim_of(_need(config, launch_spec.model_spec(config, row.part), row.launch_digest))
    except (PreflightError, TypeError):  # TypeError: launch was written by a version with other fields
        return Claim(max(private_now, row.memory_bytes or 0))


def _as_launched(row: Instance) -> ModelConfig:
    values = {name: value for name, value in row.launch.items() if name != "part"}
    if not values:
        if row.model is None:
            raise PreflightError(f"{row} has no settings any more.")
        return row.model
    return ModelConfig(**values, one_process=row.part == WHOLE)


def _need(config: ModelConfig, spec: ModelSpec, digest: str = "") -> Need:
    need = engine_memory.need_of_spec(config.engine, spec, has_gpu=bool(node_memory.gpus()))
    peak = _measured_peak(digest or launch_spec.digest(config, spec.part))
    return replace(need, measured=max(0, peak - need.pages)) if peak else need


def _measured_peak(digest: str) -> int:
    """The most memory, pages of mapped files included, that the last runs with exactly these settings held."""
    runs = Instance.objects.filter(launch_digest=digest, peak_memory_bytes__isnull=False).order_by("-exited_at")
    return max((peak or 0 for peak in runs.values_list("peak_memory_bytes", flat=True)[:RUNS_REMEMBERED]), default=0)


def _together(parts: Iterable[PartFit]) -> Claim:
    """All processes as one claim: their private memory adds up, their files count once."""
    files: dict[str, int] = {}
    private = gpu = 0
    for part in parts:
        private += part.processes * part.need.private
        gpu += part.processes * part.need.gpu
        for path, size in part.need.files.items():
            files[path] = max(size, files.get(path, 0))
    return Claim(private, files, gpu)


def _largest_ctx(engine: str, specs: Sequence[ModelSpec], processes: int) -> LargestCtx:
    """By the estimate alone: no run with that context has been measured."""
    has_gpu = bool(node_memory.gpus())

    def claim_at(ctx: int) -> Claim:
        needs = (engine_memory.need_of_spec(engine, replace(spec, ctx_size=ctx), has_gpu) for spec in specs)
        return _together(PartFit("", processes, need) for need in needs)

    def largest(host_free: int, gpu_free: int) -> int | None:
        return memory_estimate.largest_ctx(claim_at, specs[0].ctx_size - 1, host_free, gpu_free)

    return largest
