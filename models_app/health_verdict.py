"""Is a READY instance well? Pure: what was seen goes in, the verdict comes out (models_app/health.py looks and acts).

Ready is not alive is not idle: a process that lives may not answer, one that does not answer in time may be busy, and one
that is busy may have stopped getting anywhere.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from models_app.contracts.coordination import GatewayTelemetry
from models_app.engines.base import Health, Probe

FAILED_PROBES = 3  # in a row, before a process that lives is taken for sick
FRESH_BYTE_S = 15.0  # a byte this recent proves that it works
# What our own probes cost a process that does nothing else: less than this share of a processor, and a first moment of it.
IDLE_SHARE = 0.01
IDLE_CPU_S = 0.1


class Verdict(enum.StrEnum):
    """WELL and BUSY need nothing; SUSPECT is looked at again; WEDGED, SICK and DEAD are replaced."""

    WELL = "well"
    BUSY = "busy"
    SUSPECT = "suspect"
    WEDGED = "wedged"
    SICK = "sick"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the gateways see of one instance. known is False where nobody could be asked: then silence proves nothing."""

    known: bool
    in_flight: int = 0
    last_byte_s: float | None = None


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds. still: work without any sign of life or computing. request: work that computes and yields nothing."""

    still_s: float
    request_s: float


@dataclass(frozen=True, slots=True)
class Signs:
    """What one look found: times in seconds on the machine's monotonic clock.

    work: what the engine says of its slots, "" where it says nothing; any change of it is progress.
    """

    now: float
    work: str
    cpu_s: float
    byte_at: float | None


@dataclass(frozen=True, slots=True)
class Track:
    """What is remembered of the looks at one process while it has work: since when nothing came of it, and since when it has
    not even computed.
    """

    work: str
    progress_at: float
    cpu_s: float
    computed_at: float

    def silent_s(self, now: float) -> float:
        """For how long the work has yielded neither a byte nor a movement of the engine's own counters."""
        return now - self.progress_at

    def still_s(self, now: float) -> float:
        """For how long it has used no processor to speak of either."""
        return now - max(self.progress_at, self.computed_at)


def follow(before: Track | None, signs: Signs) -> Track:
    """The track after one more look. Without an earlier one everything counts from now: a restarted watcher is patient."""
    if before is None:
        return Track(signs.work, signs.now, signs.cpu_s, signs.now)
    moved = bool(signs.work) and signs.work != before.work
    progress_at = signs.now if moved else before.progress_at
    if signs.byte_at is not None:
        progress_at = max(progress_at, signs.byte_at)
    spent, elapsed = signs.cpu_s - before.cpu_s, signs.now - before.computed_at
    if spent > IDLE_CPU_S + IDLE_SHARE * elapsed:
        return Track(signs.work, progress_at, signs.cpu_s, signs.now)
    return Track(signs.work or before.work, progress_at, before.cpu_s, before.computed_at)


def has_work(probe: Probe, traffic: Traffic) -> bool:
    """Whether it does something for somebody, as far as anybody knows: where no gateway can be asked, silence may be work."""
    if traffic.in_flight or probe.slots_busy:
        return True
    return probe.health == Health.BUSY and not traffic.known


def stuck(track: Track | None, now: float, patience: Patience) -> bool:
    """Whether its work has got nowhere for too long: sooner where it does not even compute."""
    if track is None:
        return False
    return track.still_s(now) >= patience.still_s or track.silent_s(now) >= patience.request_s


def judge(living: bool, probe: Probe, traffic: Traffic, failed_before: int, wedged: bool = False) -> Verdict:
    """failed_before counts the failed probes in a row before this one; wedged is what `stuck` says of its work.

    A process that answers others, or that took its time while it works for somebody, is busy and nothing else. Wedged is one
    whose work has got nowhere for too long, whether it answers probes or not. Sick is one that does not answer and has no
    work anybody knows of, FAILED_PROBES times running.
    """
    if not living:
        return Verdict.DEAD
    fresh = traffic.last_byte_s is not None and traffic.last_byte_s < FRESH_BYTE_S
    working = has_work(probe, traffic)
    if wedged and working and not fresh:
        return Verdict.WEDGED
    if probe.health == Health.READY:
        return Verdict.BUSY if working else Verdict.WELL
    if fresh or (probe.health == Health.BUSY and working):
        return Verdict.BUSY
    return Verdict.SICK if failed_before + 1 >= FAILED_PROBES else Verdict.SUSPECT


def traffic_of(key: str, telemetry: list[GatewayTelemetry]) -> Traffic:
    """The sum over live gateways; key is "<instance id>:<generation>"."""
    rows = [gateway["instances"][key] for gateway in telemetry if key in gateway["instances"]]
    bytes_seen = [row["last_byte_s"] for row in rows if row["last_byte_s"] is not None]
    return Traffic(bool(telemetry), sum(row["in_flight"] for row in rows), min(bytes_seen, default=None))
