"""One admitted request: what it holds, and the one place where all of it is given back."""

from __future__ import annotations

import time

from gateway_app.endpoints.body import Call
from gateway_app.endpoints.http import Request
from gateway_app.endpoints.interruption import Interruption
from gateway_app.endpoints.relay import Outlet, Patience, SlowReaders
from gateway_app.keys import KeyRecord
from gateway_app.limits import Limits
from gateway_app.metering import Meter, Outcome
from gateway_app.routing.backends import Backend, Model, Offer
from gateway_app.routing.slots import Slots
from gateway_app.upstream.http import UpstreamResponse
from models_app.contracts.spool import End

_ENDS: dict[str | None, End] = {"length": "length", "tool_calls": "tool_calls", "function_call": "tool_calls"}


class Exchange:
    """Everything one request occupies. Made after admission; `finish` must follow, whatever happens."""

    __slots__ = (
        "_fields",
        "_limits",
        "_meter",
        "_readers",
        "_slots",
        "begun",
        "call",
        "endpoint",
        "excluded",
        "first_at",
        "interruption",
        "key",
        "model",
        "offer",
        "outcome",
        "outlet",
        "request",
        "response",
        "seated_at",
    )

    def __init__(
        self, request: Request, key: KeyRecord, call: Call, model: Model, endpoint: str, *,
        limits: Limits, meter: Meter, slots: Slots, readers: SlowReaders, patience: Patience,
    ) -> None:  # fmt: skip
        self.request = request
        self.key = key
        self.call = call
        self.model = model
        self.endpoint = endpoint
        self._limits = limits
        self._meter = meter
        self._slots = slots
        self._readers = readers
        limits.admit(key)  # raises before anything is held
        self.outcome = Outcome()
        self.excluded: list[Backend] = []
        self.offer: Offer | None = None
        self.response: UpstreamResponse | None = None
        self.begun = False  # the answer itself has begun, so no other backend can give it
        self.seated_at: float | None = None
        self.first_at: float | None = None
        self.interruption = Interruption(request.receive, 0.0 if call.stream else patience.watch_after_s)
        self.outlet: Outlet | None = None
        if call.stream:
            self.outlet = Outlet(request.send, request.shown_id, request.received, patience, self.interruption)
            readers.watch(self.outlet)
        self._fields = meter.start(request.id, request.received_at, key, model.name, endpoint, call.stream)

    @property
    def committed(self) -> bool:
        """Whether the client has been sent a status, so that an error must be told in-band."""
        return self.outlet is not None and self.outlet.committed

    def seat(self, offer: Offer) -> None:
        """A slot was given to this request."""
        self.offer = offer
        self.outcome.backend = offer.backend.name
        offer.backend.running[self] = now = time.monotonic()
        if self.seated_at is None:
            self.seated_at = now

    def saw_bytes(self, now: float) -> None:
        """The backend sent something at this monotonic time."""
        if self.offer is not None:
            self.offer.backend.last_byte = now

    def give_up_backend(self) -> Backend:
        """The backend failed: never again for this request. Gives it."""
        assert self.offer is not None
        backend = self.offer.backend
        self.excluded.append(backend)
        self._leave_backend()
        return backend

    def completed(self, finish_reason: str | None) -> None:
        """The answer went out whole."""
        self.outcome.status = 200
        self.outcome.end = _ENDS.get(finish_reason, "stop")

    def failed(self, status: int, end: End, code: str) -> None:
        """It did not. The status is what the client got first."""
        self.outcome.status = 200 if self.committed else status
        self.outcome.end = end
        self.outcome.error_code = code

    def finish(self) -> None:
        """Give back everything. Runs once, in the request's `finally`, and waits for nothing."""
        self.interruption.close()
        if self.outlet is not None:
            self.outlet.close()
            self._readers.forget(self.outlet)
        if self.offer is not None:
            self._leave_backend()
        self._limits.release(self.key)
        outcome, received = self.outcome, self.request.received
        now = time.monotonic()
        outcome.queue_ms = ((self.seated_at or now) - received) * 1e3
        outcome.first_ms = None if self.first_at is None else (self.first_at - received) * 1e3
        outcome.total_ms = (now - received) * 1e3
        self._meter.end(self.request.id, self._fields, outcome)

    def _leave_backend(self) -> None:
        response, self.response = self.response, None
        if response is not None:
            response.release()  # pooled if it was read to its end, closed at once if not
        offer, self.offer = self.offer, None
        if offer is not None:
            offer.backend.running.pop(self, None)
            self._slots.release(offer.backend)
