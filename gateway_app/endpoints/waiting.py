"""Waiting for a slot, for as long as the caller and the model allow."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection

from gateway_app import errors
from gateway_app.endpoints.http import Request
from gateway_app.keys import KeyRecord
from gateway_app.routing.backends import Backend, Model, Offer
from gateway_app.routing.slots import Refusal, Slots, Waiter

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


def out_of_time(model: Model, endpoint: str) -> errors.ApiError:
    """What to tell somebody who has waited long enough."""
    if not model.offers.get(endpoint):
        return errors.model_loading(None)
    return errors.queue_timeout()


def failed(model: Model, key: KeyRecord) -> errors.ApiError:
    """The diagnosis for administrators, a plain sentence for others."""
    if _ADMIN in key.scopes and model.failure:
        return errors.model_failed(model.failure)
    return errors.model_failed("The model failed to start. An administrator has been told why.")


async def wait_for_slot(
    slots: Slots, model: Model, endpoint: str, excluded: Collection[Backend], until: float, key: KeyRecord
) -> Offer:
    """A slot, in turn. Raises server_overloaded, queue_timeout, model_loading, model_failed or model_not_found.

    Cancelling leaves the queue; a slot granted in that very moment goes to the next.
    """
    loop = asyncio.get_running_loop()
    if until <= loop.time():
        raise out_of_time(model, endpoint)
    future: asyncio.Future[Offer] = loop.create_future()

    def refused(why: Refusal) -> None:
        _fail(future, errors.model_not_found(model.name) if why is Refusal.MODEL_GONE else failed(model, key))

    waiter = Waiter(endpoint, lambda offer: _grant(slots, future, offer), refused, excluded)
    if not slots.enqueue(model, waiter):
        raise errors.server_overloaded(slots.retry_after_s(model.name))
    timer = loop.call_at(until, lambda: _fail(future, out_of_time(model, endpoint)))
    try:
        return await future
    except asyncio.CancelledError:
        if future.done() and not future.cancelled() and future.exception() is None:
            slots.release(future.result().backend)
        raise
    finally:
        timer.cancel()
        slots.leave(model, waiter)


def _grant(slots: Slots, future: asyncio.Future[Offer], offer: Offer) -> None:
    if future.done():  # cancelled or out of time, and not out of the queue yet
        slots.release(offer.backend)
    else:
        future.set_result(offer)


def _fail(future: asyncio.Future[Offer], error: errors.ApiError) -> None:
    if not future.done():
        future.set_exception(error)
