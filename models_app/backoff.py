"""When a failed instance is tried again. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta

FIRST_DELAY_S = 10.0
LONGEST_DELAY_S = 300.0


def delay_s(failures: int) -> float:
    """Seconds before the next try after so many failures in a row: none, 10, 20, 40 … 300."""
    return 0.0 if failures <= 1 else min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(failures - 2, 10))


def due(next_attempt_at: datetime | None, now: datetime) -> bool:
    """Whether a try is due; never where there is to be none. A time further off than any delay was written before the clock
    was set back, and counts as come.
    """
    if next_attempt_at is None:
        return False
    return next_attempt_at <= now or next_attempt_at - now > timedelta(seconds=LONGEST_DELAY_S)
