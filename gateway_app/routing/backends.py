"""What requests can be sent to, and how busy this gateway keeps it. Pure: no Django, no I/O.

Models and offers are replaced whole with every snapshot. A Backend lives as long as what it stands for, so its counters
survive: its load is changed by routing/slots.py alone, `allowed` by the control link, `suspended` by who met it dead,
`running` by the request that is served.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from models_app.contracts.traits import part_for

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
    running: dict[object, float] = field(default_factory=dict, repr=False)  # who is served → since when; the oldest is first

    def silent_s(self, now: float) -> float | None:
        """How long at least one request has run here without a byte from the backend; None while it has nothing to do."""
        if not self.in_flight:
            return None
        since = next(iter(self.running.values()), now)
        return now - (since if self.last_byte is None else max(since, self.last_byte))

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
    local: processes of ours serve it, so a backend may yet come. parts: what those processes are (contracts/traits.py).
    failures: parts none of whose processes will come by itself, and why. context_length: tokens, None where nobody knows.
    """

    name: str
    created: int
    endpoints: frozenset[str]
    offers: Mapping[str, tuple[Offer, ...]]
    local: bool
    parts: tuple[str, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    state: Literal["ready", "loading", "idle", "failed"] = "ready"
    context_length: int | None = None

    def part(self, endpoint: str) -> str:
        """Which part answers this endpoint; empty where only remote servers do."""
        return part_for(endpoint, self.parts) or ""

    def ready(self, part: str) -> bool:
        """Whether everything this part is asked for has a backend."""
        return all(self.offers.get(endpoint) for endpoint in self.endpoints if self.part(endpoint) == part)

    def failure(self, endpoint: str) -> str | None:
        """Why nothing will answer this endpoint; None where something does or may yet."""
        return None if self.offers.get(endpoint) else self.failures.get(self.part(endpoint))

    def slots(self, part: str) -> int:
        """Requests all backends of this part serve at once."""
        backends = {offer.backend for path, offers in self.offers.items() if self.part(path) == part for offer in offers}
        return sum(backend.slots for backend in backends)
