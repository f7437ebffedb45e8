"""The gateway's link to Valkey: use keys, telemetry, demand, hints. In the background only; no request waits on it.

Use keys are the drain handshake: the control plane stops an instance when its row has left READY and every gateway's use key
of it is gone. This side of the promise:

* Valkey reachable: an instance is sent to only once its use key has been written; the key is renewed while the instance is
  READY or still has requests of ours, then deleted. What is renewed every 3 s and lives 10 s cannot lapse by a late timer.
* Valkey unreachable: instances that the database says are READY go on being served, new ones too. Refusing would turn a
  restart of Valkey into an outage, and buys nothing: without Valkey the control plane cannot see that the keys are gone either
  and must take that as unknown, not as free. DRAINING still reaches us within a second, through the snapshot, and ends the
  routing. Only a gateway cut off from Valkey *and* the database can send to an instance that is being stopped; its requests
  meet a closed port there, which is retried elsewhere.

Demand: what is wanted stands in the telemetry, so nothing is lost if the announcement is. While there is any, the link looks
more often, so that who waits a second can be told how the load is getting on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from gateway_app.loads import Loads
from gateway_app.routing.backends import Backend, Model
from gateway_app.routing.demand import Demand
from gateway_app.routing.slots import Slots
from models_app.contracts.coordination import (
    DEMAND,
    EVENTS,
    LOADS,
    TELEMETRY_LIFE_MS,
    TELEMETRY_PERIOD_S,
    USE_LIFE_MS,
    USE_RENEW_S,
    GatewayTelemetry,
    InstanceTelemetry,
    PartTelemetry,
    telemetry_key,
    use_key,
)

logger = logging.getLogger(__name__)

ANSWER_WITHIN_S = 2.0
RECONNECT_S = 0.5
LOADING_PERIOD_S = 0.25  # between two looks while somebody wants what is not there
_FAILURES = (RedisError, OSError, TimeoutError)


def _report(task: asyncio.Task[None]) -> None:
    """The link ends when it is cancelled and never else."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("The link to Valkey has ended by a fault of its own.", exc_info=error)


class ControlLink:
    """One gateway's link. Created and used on the event loop."""

    def __init__(
        self, url: str, gateway: str, node: str, *, slots: Slots, demand: Demand, loads: Loads, on_hint: Callable[[], None]
    ) -> None:
        self._gateway = gateway
        self._node = node
        self._slots = slots
        self._demand = demand
        self._loads = loads
        self._on_hint = on_hint
        retry = Retry(NoBackoff(), 1)
        self._commands = Redis.from_url(url, retry=retry, socket_timeout=ANSWER_WITHIN_S, socket_connect_timeout=ANSWER_WITHIN_S)
        self._events = Redis.from_url(url, retry=retry, socket_timeout=None, socket_connect_timeout=ANSWER_WITHIN_S)
        self._wake = asyncio.Event()
        self._tried = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._models: Mapping[str, Model] = {}
        self._instances: dict[str, Backend] = {}  # by use key: those to be held, or held until their last request ends
        self._held: set[str] = set()
        self._renewed_at = 0.0
        self._announced = 0  # demands the control plane has been woken for
        self.up: bool | None = None  # None before the first try

    async def start(self) -> None:
        """Begin, and wait until the first try has ended one way or the other."""
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(_report)
        await self._tried.wait()

    async def stop(self) -> None:
        """Give every key back."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        with contextlib.suppress(*_FAILURES):
            if self.up:
                await self._commands.delete(*self._held, telemetry_key(self._gateway))
        for client in (self._commands, self._events):
            with contextlib.suppress(*_FAILURES):
                await client.aclose()

    def adopt(self, models: Mapping[str, Model], backends: Iterable[Backend]) -> None:
        """A new snapshot: hold keys of these instances, and of earlier ones until their last request ends."""
        self._models = models
        for backend in backends:
            if backend.instance is not None:
                key = use_key(*backend.instance, self._gateway)
                self._instances[key] = backend
                backend.allowed = key in self._held or self.up is False
        self._wake.set()

    def hasten(self) -> None:
        """There is a key to give back or a demand to announce: do not wait for the next period."""
        self._wake.set()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep())
            group.create_task(self._listen())

    async def _keep(self) -> None:
        """Renew and publish, once a period or when woken."""
        while True:
            self._wake.clear()
            try:
                await self._beat()
            except _FAILURES as error:
                self._lost(error)
            self._tried.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOADING_PERIOD_S if self._demand else TELEMETRY_PERIOD_S):
                    await self._wake.wait()

    async def _beat(self) -> None:
        """One round trip: telemetry, demand, the use keys that are due, and those that are done with."""
        done = [key for key, backend in self._instances.items() if backend.retired and not backend.in_flight]
        for key in done:
            del self._instances[key]
        self._held.difference_update(done)  # before it is asked for: one that comes back meanwhile needs a new key
        self._demand.review(self._models, self._slots.queued)
        begun, wanted = self._demand.begun, dict(self._instances)
        now = time.monotonic()
        due = now - self._renewed_at >= USE_RENEW_S or not self.up
        renewed = wanted if due else {key: backend for key, backend in wanted.items() if key not in self._held}
        async with self._commands.pipeline(transaction=False) as pipe:
            pipe.set(telemetry_key(self._gateway), json.dumps(self._telemetry()), px=TELEMETRY_LIFE_MS)
            for key in renewed:
                pipe.set(key, "1", px=USE_LIFE_MS)
            if done:
                pipe.delete(*done)
            if begun != self._announced:
                pipe.publish(DEMAND, self._gateway)  # after the telemetry that says what it is
            if self._demand:
                pipe.hgetall(LOADS)
            answers = await pipe.execute()
        self._loads.take_over(answers[-1] if isinstance(answers[-1], dict) else {})
        if due:
            self._renewed_at = now
        self._announced = begun
        self._held.update(renewed)
        self._found(wanted)

    def _found(self, held: Mapping[str, Backend]) -> None:
        if self.up is False:
            logger.info("Valkey answers again.")
        self.up = True
        for key, backend in self._instances.items():
            if key not in held:
                backend.allowed = False  # came while we asked; its key is written next
            elif not backend.allowed:
                backend.allowed = True
                self._slots.reopened(backend)

    def _lost(self, error: Exception) -> None:
        if self.up is not False:
            logger.error("Valkey does not answer; requests go on without it: %s", error)
        self.up = False
        self._held.clear()
        for backend in self._instances.values():
            if not backend.allowed:
                backend.allowed = True
                self._slots.reopened(backend)

    async def _listen(self) -> None:
        """Hints hasten the comparison of revisions. A lost one costs less than a second."""
        while True:
            with contextlib.suppress(*_FAILURES):
                async with self._events.pubsub(ignore_subscribe_messages=True) as pubsub:
                    await pubsub.subscribe(EVENTS)
                    self._on_hint()  # whatever was said while nobody listened
                    async for _ in pubsub.listen():
                        self._on_hint()
            await asyncio.sleep(RECONNECT_S)

    def _telemetry(self) -> GatewayTelemetry:
        now = time.monotonic()
        instances: dict[str, InstanceTelemetry] = {}
        for backend in self._instances.values():
            if backend.instance is not None:
                instance_id, generation = backend.instance
                instances[f"{instance_id}:{generation}"] = {
                    "in_flight": backend.in_flight,
                    "last_byte_s": None if backend.last_byte is None else now - backend.last_byte,
                    "last_end_s": None if backend.last_end is None else now - backend.last_end,
                    "silent_s": backend.silent_s(now),
                }
        models = {
            name: {part: self._queue_telemetry(name, part) for part in model.parts}
            for name, model in self._models.items()
            if model.local
        }
        return {"gateway": self._gateway, "node": self._node, "instances": instances, "models": models}

    def _queue_telemetry(self, name: str, part: str) -> PartTelemetry:
        return {
            "queued": self._slots.queued(name, part),
            "oldest_wait_s": self._slots.oldest_wait_s(name, part),
            "wanted": self._demand.stands(name, part),
        }
