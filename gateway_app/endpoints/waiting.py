"""Waiting for a slot, for as long as the caller and the model allow, also for a model that must be loaded first."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection

from gateway_app import errors
from gateway_app.endpoints.http import Request
from gateway_app.keys import KeyRecord
from gateway_app.loads import Loads
from gateway_app.routing.backends import Backend, Model, Offer
from gateway_app.routing.demand import Demand
from gateway_app.routing.slots import MAX_RETRY_AFTER_S, Refusal, Slots, Waiter

STREAM_MAX_WAIT_S = 600.0  # a stream is kept warm by pings meanwhile; still nobody waits for ever
_PREFER_WAIT = re.compile(rb"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})", re.IGNORECASE)
_ADMIN = "admin"


def deadline(request: Request, stream: bool, max_wait_s: float) -> float:
    """Monotonic time at which this request stops waiting, by `Prefer: wait=N` if that is sooner. 0 never waits."""
    limit = max(max_wait_s, STREAM_MAX_WAIT_S) if stream else max_wait_s
    prefer = request.header(b"prefer")
    if prefer is not None and (found := _PREFER_WAIT.search(prefer)):
        limit = min(limit, float(found[1]))
    return request.received + limit


class WaitingRoom:
    """Where requests wait that found no slot, and what they are told when they have waited in vain."""

    def __init__(self, slots: Slots, demand: Demand, loads: Loads) -> None:
        self._slots = slots
        self._demand = demand
        self._loads = loads

    async def wait(self, model: Model, endpoint: str, excluded: Collection[Backend], until: float, key: KeyRecord) -> Offer:
        """A slot, in turn. Raises server_overloaded, queue_timeout, model_loading, model_failed or model_not_found.

        Cancelling leaves the queue; a slot granted in that very moment goes to the next.
        """
        slots, loop, part = self._slots, asyncio.get_running_loop(), model.part(endpoint)
        if not model.offers.get(endpoint):
            self._demand.ask(model, part)
        if (failure := model.failure(endpoint)) is not None:
            raise _failed(failure, key)
        if until <= loop.time():
            raise self._out_of_time(model, endpoint, key)
        future: asyncio.Future[Offer] = loop.create_future()
        waiter = Waiter(
            endpoint,
            lambda offer: self._grant(future, offer),
            lambda why: _fail(future, self._refusal(why, model, endpoint, key)),
            excluded,
        )
        if not slots.enqueue(model, waiter):
            raise errors.server_overloaded(self._retry_after_s(model, endpoint))
        timer = loop.call_at(until, lambda: _fail(future, self._out_of_time(model, endpoint, key)))
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                slots.release(future.result().backend)
            raise
        finally:
            timer.cancel()
            slots.leave(model, waiter)

    def _retry_after_s(self, model: Model, endpoint: str) -> float:
        """When a full queue should have room: not before the model has been loaded."""
        part = model.part(endpoint)
        load = None if model.offers.get(endpoint) else self._loads.find(model.name, part)
        expected = (load["eta_s"] or 0.0) if load is not None else 0.0
        return min(MAX_RETRY_AFTER_S, max(expected, self._slots.retry_after_s(model.name, part)))

    def _grant(self, future: asyncio.Future[Offer], offer: Offer) -> None:
        if future.done():  # cancelled or out of time, and not out of the queue yet
            self._slots.release(offer.backend)
        else:
            future.set_result(offer)

    def _refusal(self, why: Refusal, model: Model, endpoint: str, key: KeyRecord) -> errors.ApiError:
        if why is Refusal.MODEL_GONE:
            return errors.model_not_found(model.name)
        return _failed(self._slots.latest(model).failure(endpoint) or "", key)

    def _out_of_time(self, model: Model, endpoint: str, key: KeyRecord) -> errors.ApiError:
        """What to tell somebody who has waited long enough: whether for a slot or for the model, as of now."""
        model = self._slots.latest(model)
        if model.offers.get(endpoint):
            return errors.queue_timeout()
        load = self._loads.find(model.name, model.part(endpoint))
        if load is None:
            return errors.model_loading(None)
        detail = load["detail"] if _may_know_of_others(key) else ""
        return errors.model_loading(load["eta_s"], load["state"], load["progress"], detail)


def _failed(reason: str, key: KeyRecord) -> errors.ApiError:
    """The diagnosis for administrators, a plain sentence for others."""
    if _ADMIN in key.scopes and reason:
        return errors.model_failed(reason)
    return errors.model_failed("The model failed to start. An administrator has been told why.")


def _may_know_of_others(key: KeyRecord) -> bool:
    """What a load waits for may be another model, whose name a key for some models only must not learn."""
    return key.models is None or _ADMIN in key.scopes


def _fail(future: asyncio.Future[Offer], error: errors.ApiError) -> None:
    if not future.done():
        future.set_exception(error)
