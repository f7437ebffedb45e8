"""Whether a client has gone whose connection is not being read, so that no event tells."""

from __future__ import annotations

import select

_CLOSED_BY_PEER = getattr(select, "POLLRDHUP", 0)  # Linux; elsewhere only a connection that is gone altogether shows


def hung_up(descriptor: int) -> bool:
    """Whether the peer has closed or reset this connection, whatever of it is still unread."""
    poll = select.poll()
    poll.register(descriptor, _CLOSED_BY_PEER)  # errors and hang-ups are always told
    return bool(poll.poll(0))
