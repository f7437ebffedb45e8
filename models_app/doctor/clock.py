"""Clocks: expiry, quotas and back-off follow the wall clock, and so do certificates."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta

from django.db import connection
from django.db.models import Max
from django.utils import timezone

from models_app.doctor.finding import Context, Finding, fail, ok, warn
from models_app.models import Instance

YEARS = range(2025, 2100)
SKEW_S = 2.0
STEP_S = 0.5
WATCH_S = 1.0
SET_IT = "Set the clock, and let NTP keep it."


def check_local(context: Context) -> Iterable[Finding]:
    yield judge_year(datetime.now(UTC).year)
    yield judge_ntp(_ntp_synchronized())
    if not context.fast:
        yield judge_steps(*_watch())


def check_database(context: Context) -> Iterable[Finding]:
    if connection.vendor != "sqlite":  # whose clock is ours
        yield judge_skew(_skew_s())
    yield from judge_newest(Instance.objects.aggregate(newest=Max("state_changed_at"))["newest"], timezone.now())


def judge_year(year: int) -> Finding:
    if year not in YEARS:
        return fail(f"The clock says it is the year {year}.", SET_IT)
    return ok(f"The clock says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.")


def _watch() -> tuple[float, float]:
    """Seconds passed by the wall clock and by the monotonic one over the same moment."""
    wall, monotonic = time.time(), time.monotonic()
    time.sleep(WATCH_S)
    return time.time() - wall, time.monotonic() - monotonic


def judge_steps(wall_s: float, monotonic_s: float) -> Finding:
    if abs(wall_s - monotonic_s) > STEP_S:
        return warn(f"The clock jumped by {wall_s - monotonic_s:+.1f} s while it was watched.", "Let one time service set it.")
    return ok("The clock runs evenly.")


def _ntp_synchronized() -> str:
    """ "yes" or "no" as timedatectl says, empty where nobody can tell."""
    program = shutil.which("timedatectl")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, "show", "--property", "NTPSynchronized", "--value"], capture_output=True, text=True, timeout=3, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def judge_ntp(synchronized: str) -> Finding:
    if synchronized == "no":
        return warn("The clock is not kept by NTP.", "Run: timedatectl set-ntp true.")
    return ok("The clock is kept by NTP." if synchronized == "yes" else "Whether NTP keeps the clock is not told here.")


def _skew_s() -> float:
    """How far the database's clock is ahead of ours."""
    before = timezone.now()
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        (theirs,) = cursor.fetchone()
    after = timezone.now()
    return float((theirs - (before + (after - before) / 2)).total_seconds())


def judge_skew(seconds: float) -> Finding:
    if abs(seconds) > SKEW_S:
        return fail(f"The database's clock differs from ours by {seconds:+.1f} s.", "Let NTP keep both.")
    return ok(f"The database's clock agrees with ours to {abs(seconds):.2f} s.")


def judge_newest(newest: datetime | None, now: datetime) -> Iterator[Finding]:
    """A record from the future: the clock was set back, and what waits for a time may wait long."""
    if newest is not None and newest - now > timedelta(seconds=60):
        yield warn(
            f"The newest record is of {newest:%Y-%m-%d %H:%M} UTC, which is still to come: the clock was set back.", SET_IT
        )
