"""What requests can be sent to, and how busy this gateway keeps it. Pure: no Django, no I/O.

Models and offers are replaced whole with every snapshot. A Backend lives as long as what it stands for, so its counters
survive: its load is changed by routing/slots.py alone, `allowed` by the control link, `suspended` by who met it dead.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway_app.upstream.origin import Origin

Header = tuple[bytes, bytes]


@dataclass(slots=True, eq=False, kw_only=True, weakref_slot=True)
class Backend:
    """One engine process or one remote server.

    name: as usage events show it. instance: (id, generation) of an engine process, None for a remote server.
    targets: endpoint → request target there. weight: share of traffic against others of the same load, above zero.
    """

    name: str
    ident: Hashable
    origin: Origin
    targets: Mapping[str, bytes]
    headers: tuple[Header, ...] = field(repr=False)  # carries the backend's secret
    instance: tuple[int, int] | None = None
    slots: int = 1
    weight: float = 1.0

    allowed: bool = True
    suspended: bool = False
    retired: bool = False  # not in the snapshot any more
    in_flight: int = 0
    picked: int = 0  # when it was last chosen, as a count of choices
    last_byte: float | None = None  # monotonic seconds
    last_end: float | None = None

    @property
    def has_room(self) -> bool:
        """Whether one more request may be sent now."""
        return self.in_flight < self.slots and self.allowed and not self.suspended and not self.retired


@dataclass(frozen=True, slots=True)
class Offer:
    """A backend that serves a model under the name used there."""

    backend: Backend
    model_name: str


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """One model clients may name.

    offers: by endpoint; an endpoint that is missing here but in `endpoints` has no ready backend just now.
    local: processes of ours serve it, so a backend may yet come. failure: why none will (all in CRASH_LOOP), else None.
    """

    name: str
    created: int
    endpoints: frozenset[str]
    offers: Mapping[str, tuple[Offer, ...]]
    local: bool
    failure: str | None = None

    @property
    def slots(self) -> int:
        """Requests all its backends serve at once."""
        backends = {offer.backend for offers in self.offers.values() for offer in offers}
        return sum(backend.slots for backend in backends)
