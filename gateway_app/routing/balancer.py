"""Which backend gets the next request. Pure: no Django, no I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from gateway_app.routing.backends import Backend, Offer


def choose(offers: Iterable[Offer], excluded: Collection[Backend] = ()) -> Offer | None:
    """The offer whose backend has room and the smallest share of its slots in use, weighted; None if none has room.

    Ties go to the backend that was picked longest ago, so equal backends take turns however the list changes.
    """
    best: Offer | None = None
    best_rank = (0.0, 0)
    for offer in offers:
        backend = offer.backend
        if not backend.has_room or backend in excluded:
            continue
        rank = (backend.in_flight / (backend.slots * backend.weight), backend.picked)
        if best is None or rank < best_rank:
            best, best_rank = offer, rank
    return best
