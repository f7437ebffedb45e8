"""What one key may do at once. Pure: no Django, no I/O.

Admission asks here after key, scope and model are known and before the queue, and gives back what it got in the request's one
`finally`. Requests and tokens per minute and budgets are to be taken in `admit` beside the parallel count, all or none.
"""

from __future__ import annotations

from gateway_app import errors
from gateway_app.keys import KeyRecord

_RETRY_AFTER_S = 1.0  # nobody knows when one of the key's own requests ends


class Limits:
    """Counts what runs under each key. One event loop's."""

    def __init__(self) -> None:
        self._running: dict[int, int] = {}

    def admit(self, key: KeyRecord) -> None:
        """Count one more request of this key. Raises rate_limit_exceeded, and counts nothing, where it has too many."""
        running = self._running.get(key.id, 0)
        if key.parallel is not None and running >= key.parallel:
            message = f"This API key allows {key.parallel} requests at once and that many are running."
            raise errors.rate_limit_exceeded("requests", message, _RETRY_AFTER_S)
        self._running[key.id] = running + 1

    def release(self, key: KeyRecord) -> None:
        """One admitted request of this key has ended."""
        left = self._running[key.id] - 1
        if left:
            self._running[key.id] = left
        else:
            del self._running[key.id]

    def running(self, key: KeyRecord) -> int:
        """Requests of this key that run now."""
        return self._running.get(key.id, 0)
