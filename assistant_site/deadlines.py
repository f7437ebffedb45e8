"""How long a server waits for a client before it gives the connection up. Seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Checked once a second, so each may take a second more."""

    head: float = 30.0  # from connecting, or the first byte of a request, to the end of its headers
    body: float = 60.0  # between two pieces of a body that the application waits for
    keep_alive: float = 75.0  # between two requests
    stalled: float = 120.0  # without a byte read by the client while an answer waits; applications may be stricter
    discard: float = 2.0  # for a refused client to stop sending and read the answer
    close: float = 15.0  # without progress of the last bytes of an answer


DEFAULT = Deadlines()
