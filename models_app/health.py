"""Look at the READY instances of this node and act on what health_verdict.py says of them."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple

import psutil
from django.conf import settings

from models_app import coordination, diagnosis, lifecycle, provisioning, runtime_folder
from models_app.contracts.coordination import GatewayTelemetry
from models_app.engines.base import Health, Probe
from models_app.exceptions import CoordinationUnavailable, StaleTransition
from models_app.health_verdict import Patience, Signs, Track, Traffic, Verdict, follow, has_work, judge, stuck, traffic_of
from models_app.models import Instance, State
from models_app.process_identity import alive

log = logging.getLogger(__name__)

PROBES_AT_ONCE = 16
COUNT_LIFE_MS = 60_000  # failed probes further apart than this are not "in a row"
REPORT_LIFE_MS = 20_000


def _ready_here(node_name: str) -> list[Instance]:
    return list(Instance.objects.ready().filter(node__name=node_name).select_related("node", "model"))


def watch(node_name: str) -> int:
    """Bury READY instances whose process has ended: reads /proc alone, so it can run often. How many there were."""
    buried = 0
    for instance in _ready_here(node_name):
        engine = provisioning.engine_of(instance)
        if engine is None or not alive(engine):
            buried += _acted(instance, Verdict.DEAD, Probe(Health.UNREACHABLE), None)
    return buried


def check(node_name: str) -> int:
    """Probe every READY instance of this node once; how many were found dead, wedged or sick."""
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
    track = _track(instance, probe, traffic) if living else None
    wedged = stuck(track, time.monotonic(), patience())
    verdict = judge(living, probe, traffic, 0, wedged)
    if verdict == Verdict.SUSPECT:
        verdict = judge(living, probe, traffic, _count_failure(instance), wedged)
    elif verdict in (Verdict.WELL, Verdict.BUSY) and probe.health == Health.READY:
        _forget_failures(instance)
    _report(instance, verdict, probe)
    return _acted(instance, verdict, probe, track)


def patience() -> Patience:
    """How long work may get nowhere."""
    return Patience(settings.ASSISTANT_ENGINE_STILL_S, settings.ASSISTANT_ENGINE_SILENT_S)


def _track(instance: Instance, probe: Probe, traffic: Traffic) -> Track | None:
    """What has come of its work so far; None where it has none, or where that cannot be told."""
    try:
        if not has_work(probe, traffic):
            coordination.forget_work_track(instance.pk, instance.generation)
            return None
        kept = coordination.work_track(instance.pk, instance.generation)
        track = follow(None if kept is None else Track(*kept), _signs(instance, probe, traffic))
        coordination.keep_work_track(instance.pk, instance.generation, list(astuple(track)), COUNT_LIFE_MS)
    except (psutil.Error, CoordinationUnavailable) as error:
        log.debug("Whether %s gets on is not known: %s", instance, error)
        return None
    return track


def _signs(instance: Instance, probe: Probe, traffic: Traffic) -> Signs:
    used = psutil.Process(instance.pid).cpu_times()
    now = time.monotonic()
    byte_at = None if traffic.last_byte_s is None else now - traffic.last_byte_s
    return Signs(now, probe.work, used.user + used.system, byte_at)


def _count_failure(instance: Instance) -> int:
    """Failed probes in a row before this one; this one is counted."""
    try:
        return coordination.count_probe_failure(instance.pk, instance.generation, COUNT_LIFE_MS) - 1
    except CoordinationUnavailable:
        return 0


def _forget_failures(instance: Instance) -> None:
    try:
        coordination.forget_probe_failures(instance.pk, instance.generation)
    except CoordinationUnavailable as error:
        log.debug("Failed probes of %s not forgotten: %s", instance, error)


def _report(instance: Instance, verdict: Verdict, probe: Probe) -> None:
    report: coordination.HealthReport = {"verdict": verdict, "detail": probe.detail, "at": time.time()}
    try:
        coordination.report_health(instance.pk, instance.generation, report, REPORT_LIFE_MS)
    except CoordinationUnavailable as error:
        log.debug("How %s is doing is not told: %s", instance, error)


def _acted(instance: Instance, verdict: Verdict, probe: Probe, track: Track | None) -> bool:
    """Carry out the verdict; True where the instance left READY."""
    try:
        if verdict == Verdict.DEAD:
            provisioning.bury(instance)
        elif verdict in (Verdict.SICK, Verdict.WEDGED):
            _replace(instance, _complaint(verdict, probe, track))
        else:
            _warn(instance, verdict, probe, track)
            return False
    except StaleTransition as error:
        log.info("Overtaken: %s", error)
        return False
    return True


def _warn(instance: Instance, verdict: Verdict, probe: Probe, track: Track | None) -> None:
    if verdict == Verdict.SUSPECT:
        log.warning("%s generation %d: %s %s", instance, instance.generation, probe.health, probe.detail)
    elif track is not None and track.silent_s(time.monotonic()) >= patience().still_s:
        silent = track.silent_s(time.monotonic())
        log.warning("%s generation %d computes, but nothing has come of it for %.0f s", instance, instance.generation, silent)


def _complaint(verdict: Verdict, probe: Probe, track: Track | None) -> str:
    if verdict == Verdict.SICK or track is None:
        return f"failed its probes again and again: {probe.detail or probe.health}"
    now = time.monotonic()
    computes = "and did not compute" if track.still_s(now) >= patience().still_s else "although it computed"
    return f"had a request and gave no sign of it for {track.silent_s(now):.0f} s {computes}"


def _replace(instance: Instance, complaint: str) -> None:
    """End a process that lives but does not serve, and let it be started anew."""
    if instance.state != State.READY:
        return
    lines = runtime_folder.last_log_lines(provisioning.folder_of(instance), 200)
    provisioning.kill(instance)
    end = diagnosis.wedged(complaint, lines, runtime_folder.read_exit(provisioning.folder_of(instance)))
    log.warning("%s generation %d: %s", instance, instance.generation, end.reason)
    lifecycle.failed(instance, end)
