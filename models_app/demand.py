"""Hear at once when somebody waits for a model that does not run, instead of at the next periodic reconcile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from redis.client import PubSub
from redis.exceptions import RedisError

from models_app import coordination
from models_app.contracts.coordination import DEMAND
from models_app.exceptions import CoordinationUnavailable

log = logging.getLogger(__name__)

DEBOUNCE_S = 0.05  # between two calls, over all listeners: a crowd is answered as one
IDLE_S = 0.5  # between two looks at whether it shall end
RECONNECT_S = 0.5


class DemandListener(threading.Thread):
    """Calls on_demand soon after every DEMAND, from a thread of its own, until stop().

    It goes on through losses of Valkey, and calls once whenever it has (re)connected, for whatever was said meanwhile.
    What a listener elsewhere has just answered is asked again DEBOUNCE_S later: ours may have been said after that.
    """

    def __init__(self, on_demand: Callable[[], None]) -> None:
        super().__init__(name="demand", daemon=True)
        self._on_demand = on_demand
        self._ended = threading.Event()

    def stop(self) -> None:
        """End within IDLE_S."""
        self._ended.set()

    def run(self) -> None:
        while not self._ended.is_set():
            try:
                self._listen()
            except (RedisError, OSError, CoordinationUnavailable) as error:
                log.debug("Demand is not heard: %s", error)
                self._ended.wait(RECONNECT_S)

    def _listen(self) -> None:
        with PubSub(coordination.client().connection_pool, ignore_subscribe_messages=True) as pubsub:
            pubsub.subscribe(DEMAND)
            unanswered = True
            while not self._ended.is_set():
                if unanswered and coordination.acquire("demand", int(DEBOUNCE_S * 1000)) is not None:
                    self._on_demand()
                    unanswered = False
                if pubsub.get_message(timeout=DEBOUNCE_S if unanswered else IDLE_S) is not None:
                    unanswered = True
