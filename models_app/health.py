"""Is a READY instance well? `judge` decides and is pure; `check` and `watch` look and act on the instances of this node.

Ready is not alive is not idle: a process that lives may not answer, and one that does not answer in time may be busy.
"""

from __future__ import annotations

import enum
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil

from models_app import coordination, diagnosis, lifecycle, provisioning, runtime_folder
from models_app.contracts.coordination import GatewayTelemetry
from models_app.engines.base import Health, Probe
from models_app.exceptions import CoordinationUnavailable, StaleTransition
from models_app.models import Instance, State
from models_app.process_identity import alive

log = logging.getLogger(__name__)

FAILED_PROBES = 3  # in a row, before a process that lives is taken for sick
FRESH_BYTE_S = 15.0  # a byte this recent proves that it works
STILL_S = 120.0  # busy and silent for so long without computing: it is wedged
PROBES_AT_ONCE = 16
COUNT_LIFE_MS = 60_000  # failed probes further apart than this are not "in a row"
# What our own probes cost a process that does nothing else: less than this share of a processor, and a first moment of it.
IDLE_SHARE = 0.01
IDLE_CPU_S = 0.1


class Verdict(enum.StrEnum):
    """WELL and BUSY need nothing; SUSPECT is looked at again; SICK and DEAD are replaced."""

    WELL = "well"
    BUSY = "busy"
    SUSPECT = "suspect"
    SICK = "sick"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the gateways see of one instance. known is False where nobody could be asked: then silence proves nothing."""

    known: bool
    in_flight: int = 0
    last_byte_s: float | None = None


def judge(living: bool, probe: Probe, traffic: Traffic, failed_before: int, still_s: float = 0.0) -> Verdict:
    """failed_before counts the failed probes in a row before this one; still_s is for how long it has not computed.

    A process that answers others, or that took its time while it works for somebody, is busy and nothing else. Sick is a
    process that does not answer, has no work anybody knows of, and does so FAILED_PROBES times running; and one that has
    work but neither answers nor computes for STILL_S.
    """
    if not living:
        return Verdict.DEAD
    if probe.health == Health.READY:
        return Verdict.WELL
    fresh = traffic.last_byte_s is not None and traffic.last_byte_s < FRESH_BYTE_S
    if fresh or (probe.health == Health.BUSY and (traffic.in_flight > 0 or not traffic.known)):
        return Verdict.BUSY if fresh or still_s < STILL_S else Verdict.SICK
    return Verdict.SICK if failed_before + 1 >= FAILED_PROBES else Verdict.SUSPECT


def traffic_of(key: str, telemetry: list[GatewayTelemetry]) -> Traffic:
    """The sum over live gateways; key is "<instance id>:<generation>"."""
    rows = [gateway["instances"][key] for gateway in telemetry if key in gateway["instances"]]
    bytes_seen = [row["last_byte_s"] for row in rows if row["last_byte_s"] is not None]
    return Traffic(bool(telemetry), sum(row["in_flight"] for row in rows), min(bytes_seen, default=None))


def _ready_here(node_name: str) -> list[Instance]:
    return list(Instance.objects.ready().filter(node__name=node_name).select_related("node", "model"))


def watch(node_name: str) -> int:
    """Bury READY instances whose process has ended: reads /proc alone, so it can run often. How many there were."""
    buried = 0
    for instance in _ready_here(node_name):
        engine = provisioning.engine_of(instance)
        if engine is None or not alive(engine):
            buried += _acted(instance, Verdict.DEAD, Probe(Health.UNREACHABLE))
    return buried


def check(node_name: str) -> int:
    """Probe every READY instance of this node once; how many were found dead or sick."""
    try:
        telemetry = coordination.telemetry()
    except CoordinationUnavailable as error:
        log.warning("Gateways cannot be asked: %s", error)
        telemetry = []
    instances = _ready_here(node_name)
    # Side by side: a few busy engines, each silent until its time-out, must not use up the time of the round.
    with ThreadPoolExecutor(PROBES_AT_ONCE) as threads:
        probes = list(threads.map(provisioning.probe, instances))
    return sum(_conclude(instance, probe, telemetry) for instance, probe in zip(instances, probes, strict=True))


def _conclude(instance: Instance, probe: Probe, telemetry: list[GatewayTelemetry]) -> bool:
    engine = provisioning.engine_of(instance)
    living = engine is not None and alive(engine)
    traffic = traffic_of(f"{instance.pk}:{instance.generation}", telemetry)
    verdict = judge(living, probe, traffic, 0)
    if verdict == Verdict.SUSPECT:
        verdict = judge(living, probe, traffic, _count_failure(instance))
    elif verdict == Verdict.BUSY and probe.health == Health.BUSY:
        verdict = judge(living, probe, traffic, 0, _still_s(instance))
    elif verdict == Verdict.WELL:
        _forget_failures(instance)
    return _acted(instance, verdict, probe)


def _count_failure(instance: Instance) -> int:
    """Failed probes in a row before this one; this one is counted."""
    try:
        return coordination.count_probe_failure(instance.pk, instance.generation, COUNT_LIFE_MS) - 1
    except CoordinationUnavailable:
        return 0


def _still_s(instance: Instance) -> float:
    """For how many seconds, over probes that all timed out, the process has used no processor to speak of."""
    try:
        used = psutil.Process(instance.pid).cpu_times()
        now, cpu = time.monotonic(), used.user + used.system
        since, cpu_then = coordination.first_still(instance.pk, instance.generation, (now, cpu), COUNT_LIFE_MS)
        if cpu - cpu_then <= IDLE_CPU_S + IDLE_SHARE * (now - since):
            return now - since
        coordination.forget_still(instance.pk, instance.generation)
    except (psutil.Error, CoordinationUnavailable) as error:
        log.debug("Whether %s computes is not known: %s", instance, error)
    return 0.0


def _forget_failures(instance: Instance) -> None:
    try:
        coordination.forget_probe_failures(instance.pk, instance.generation)
        coordination.forget_still(instance.pk, instance.generation)
    except CoordinationUnavailable as error:
        log.debug("Failed probes of %s not forgotten: %s", instance, error)


def _acted(instance: Instance, verdict: Verdict, probe: Probe) -> bool:
    """Carry out the verdict; True where the instance left READY."""
    try:
        if verdict == Verdict.DEAD:
            provisioning.bury(instance)
        elif verdict == Verdict.SICK:
            _replace_sick(instance, probe)
        else:
            if verdict == Verdict.SUSPECT:
                log.warning("%s generation %d: %s %s", instance, instance.generation, probe.health, probe.detail)
            return False
    except StaleTransition as error:
        log.info("Overtaken: %s", error)
        return False
    return True


def _replace_sick(instance: Instance, probe: Probe) -> None:
    """End a process that lives but does not serve, and let it be started anew."""
    if instance.state != State.READY:
        return
    lines = runtime_folder.last_log_lines(provisioning.folder_of(instance), 200)
    provisioning.kill(instance)
    end = diagnosis.wedged(probe.detail or probe.health, lines, runtime_folder.read_exit(provisioning.folder_of(instance)))
    log.warning("%s generation %d: %s", instance, instance.generation, end.reason)
    lifecycle.failed(instance, end)
