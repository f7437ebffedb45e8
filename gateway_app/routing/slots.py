"""Bounded in-flight requests per backend, and who waits for a slot. Pure: no Django, no I/O; the event loop is the caller's.

Every part of a model has a queue of its own: who waits for embeddings never stands behind who waits for chat.

Invariant: nobody waits for a slot that is free and that he could use. Whatever frees or adds a slot (release, refresh,
reopened) hands it to a waiter at once, so a free slot seen by a new request belongs to nobody, and nobody is overtaken.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from gateway_app.routing.backends import Backend, Model, Offer
from gateway_app.routing.balancer import choose

QUEUE_PER_SLOT = 64
QUEUE_AT_LEAST = 256
MAX_RETRY_AFTER_S = 60.0
_SMOOTHING = 0.2  # weight of the newest interval in the drain rate


class Refusal(enum.Enum):
    """Why a waiter is sent away before its time."""

    MODEL_GONE = enum.auto()
    MODEL_FAILED = enum.auto()


@dataclass(slots=True, eq=False)
class Waiter:
    """Somebody in the queue. Exactly one of the callbacks is called, at most once; the granted slot is then his to release."""

    endpoint: str
    granted: Callable[[Offer], None]
    refused: Callable[[Refusal], None]
    excluded: Collection[Backend] = ()
    since: float = field(default_factory=time.monotonic)
    part: str = ""  # whose queue it is in, set by Slots


@dataclass(slots=True)
class _Queue:
    waiters: deque[Waiter] = field(default_factory=deque)
    interval_s: float = 0.0  # smoothed time between two grants
    last_grant: float | None = None

    def grant(self, waiter: Waiter, offer: Offer, now: float) -> None:
        self.waiters.remove(waiter)
        if self.last_grant is not None:
            self.interval_s += _SMOOTHING * (now - self.last_grant - self.interval_s)
        self.last_grant = now if self.waiters else None
        waiter.granted(offer)


class Slots:
    """The one owner of every backend's load. drained: told of a retired backend whose last request has ended."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, drained: Callable[[Backend], None] = lambda _: None) -> None:
        self._clock = clock
        self._drained = drained
        self._models: Mapping[str, Model] = {}
        self._queues: dict[tuple[str, str], _Queue] = {}  # by model and part
        self._picks = 0
        self.waiting = 0

    def take(self, model: Model, endpoint: str, excluded: Collection[Backend] = ()) -> Offer | None:
        """A slot now, or None where all are busy; the caller must release it."""
        offer = choose(model.offers.get(endpoint, ()), excluded)
        if offer is not None:
            self._occupy(offer.backend)
        return offer

    def release(self, backend: Backend) -> None:
        """Give a slot back; the oldest waiter who can use it gets it within this call."""
        backend.in_flight -= 1
        backend.last_end = self._clock()
        if backend.retired and not backend.in_flight:
            self._drained(backend)
        if self.waiting:
            self._hand_out(backend)

    def enqueue(self, model: Model, waiter: Waiter) -> bool:
        """Queue behind everybody else; False where the queue is full."""
        waiter.part = model.part(waiter.endpoint)
        queue = self._queues.setdefault((model.name, waiter.part), _Queue())
        if len(queue.waiters) >= max(QUEUE_AT_LEAST, QUEUE_PER_SLOT * model.slots(waiter.part)):
            return False
        queue.waiters.append(waiter)
        self.waiting += 1
        return True

    def leave(self, model: Model, waiter: Waiter) -> None:
        """Leave the queue; nothing happens to somebody who is not in it any more."""
        queue = self._queues.get((model.name, waiter.part))
        if queue is not None and waiter in queue.waiters:
            queue.waiters.remove(waiter)
            self.waiting -= 1

    def refresh(self, models: Mapping[str, Model]) -> None:
        """A new snapshot, by the models' own names: new slots are handed out, waiters without hope are sent away."""
        self._models = models
        for (name, part), queue in list(self._queues.items()):
            model = models.get(name)
            if model is None:
                self._refuse(queue, set(queue.waiters), Refusal.MODEL_GONE)
                del self._queues[name, part]
            elif any(model.part(waiter.endpoint) != part for waiter in queue.waiters):
                self._move(model, self._queues.pop((name, part)))
        for name in {name for (name, _), queue in self._queues.items() if queue.waiters}:
            for backend in {offer.backend for offers in models[name].offers.values() for offer in offers}:
                self._hand_out(backend)
        for (name, _), queue in self._queues.items():
            if models[name].failures:
                hopeless = {waiter for waiter in queue.waiters if models[name].failure(waiter.endpoint) is not None}
                self._refuse(queue, hopeless, Refusal.MODEL_FAILED)

    def reopened(self, backend: Backend) -> None:
        """The backend may be used again."""
        if self.waiting:
            self._hand_out(backend)

    def latest(self, model: Model) -> Model:
        """The same model as the newest snapshot has it; as it was where it is gone."""
        return self._models.get(model.name, model)

    def queued(self, name: str, part: str) -> int:
        """How many wait for this part of a model."""
        queue = self._queues.get((name, part))
        return len(queue.waiters) if queue else 0

    def oldest_wait_s(self, name: str, part: str) -> float:
        """How long the first in this queue has waited; 0 with nobody there."""
        queue = self._queues.get((name, part))
        return self._clock() - queue.waiters[0].since if queue and queue.waiters else 0.0

    def retry_after_s(self, name: str, part: str) -> float:
        """When a full queue should have drained, from the rate it drains at: 1 to MAX_RETRY_AFTER_S seconds."""
        queue = self._queues.get((name, part))
        expected = len(queue.waiters) * queue.interval_s if queue else 0.0
        return min(MAX_RETRY_AFTER_S, max(1.0, expected))

    def _occupy(self, backend: Backend) -> None:
        self._picks += 1
        backend.picked = self._picks
        backend.in_flight += 1

    def _hand_out(self, backend: Backend) -> None:
        while backend.has_room and (found := self._oldest_for(backend)):
            queue, waiter, offer = found
            self.waiting -= 1
            self._occupy(backend)
            queue.grant(waiter, offer, self._clock())

    def _oldest_for(self, backend: Backend) -> tuple[_Queue, Waiter, Offer] | None:
        found: tuple[_Queue, Waiter, Offer] | None = None
        for (name, _), queue in self._queues.items():
            model = self._models.get(name)
            candidate = self._first_for(backend, model, queue) if model is not None and queue.waiters else None
            if candidate is not None and (found is None or candidate[0].since < found[1].since):
                found = (queue, *candidate)
        return found

    @staticmethod
    def _first_for(backend: Backend, model: Model, queue: _Queue) -> tuple[Waiter, Offer] | None:
        offers = {endpoint: offer for endpoint, listed in model.offers.items() for offer in listed if offer.backend is backend}
        if offers:
            for waiter in queue.waiters:
                if waiter.endpoint in offers and backend not in waiter.excluded:
                    return waiter, offers[waiter.endpoint]
        return None

    def _move(self, model: Model, old: _Queue) -> None:
        """The model's parts have changed: its waiters go on waiting for what answers them now, each at his place in time."""
        for waiter in old.waiters:
            waiter.part = model.part(waiter.endpoint)
            self._queues.setdefault((model.name, waiter.part), _Queue()).waiters.append(waiter)
        for part in {waiter.part for waiter in old.waiters}:
            queue = self._queues[model.name, part]
            queue.waiters = deque(sorted(queue.waiters, key=lambda waiter: waiter.since))

    def _refuse(self, queue: _Queue, waiters: set[Waiter], why: Refusal) -> None:
        self.waiting -= len(waiters)
        queue.waiters = deque(waiter for waiter in queue.waiters if waiter not in waiters)
        for waiter in waiters:
            waiter.refused(why)
