"""Names and payloads in Valkey or Redis shared by the gateway and the control plane. Pure: no Django, no I/O.

Nothing here is a record: all of it may vanish at any time and is made anew within seconds.
"""

from __future__ import annotations

from typing import Literal, TypedDict

PREFIX = "assistant:"

# A gateway says here that somebody waits for a model that has no ready process; what it wants stands in its telemetry.
DEMAND = PREFIX + "demand"
DEMAND_LIFE_S = 15.0  # a model counts as wanted so long after the last request that found nothing ready
# Hash of the loads under way: load_field() → LoadProgress as JSON. Written by the control plane every second or so.
LOADS = PREFIX + "loads"
LOAD_LIFE_S = 10.0  # an older entry says nothing any more

# Hints to gateways and consoles (pub/sub). Losing one costs at most a second.
EVENTS = PREFIX + "events"

USE_LIFE_MS = 10_000  # a gateway may send to an instance only while it holds the use key
USE_RENEW_S = 3.0
TELEMETRY_LIFE_MS = 5_000
TELEMETRY_PERIOD_S = 1.0


class RevisionHint(TypedDict):
    """Something a gateway must know has changed; compare the revision now instead of within a second."""

    type: Literal["revision"]


class InstanceTelemetry(TypedDict):
    """One backend as one gateway sees it."""

    in_flight: int
    last_byte_s: float | None  # seconds since a byte came from it, None if never
    last_end_s: float | None  # seconds since a request to it ended, None if never
    silent_s: float | None  # how long something has run there and no byte come; None with nothing in flight


class PartTelemetry(TypedDict):
    """The queue of one part of a model (contracts/traits.py) at one gateway."""

    queued: int
    oldest_wait_s: float
    wanted: bool  # within DEMAND_LIFE_S somebody asked for it and found no ready process, or waits for one now


class LoadProgress(TypedDict):
    """One load under way, for whoever waits for it."""

    state: Literal["waiting", "loading"]  # waiting: for memory or for a node
    progress: float  # 0 to 1
    eta_s: float | None  # seconds until it should be ready, None where nothing is known
    detail: str  # one sentence: what it waits for; empty while it loads
    at: float  # Unix time


class GatewayTelemetry(TypedDict):
    """JSON at telemetry_key(gateway), life TELEMETRY_LIFE_MS."""

    gateway: str
    node: str
    instances: dict[str, InstanceTelemetry]  # by "<instance id>:<generation>"
    models: dict[str, dict[str, PartTelemetry]]  # by model name, then part


def use_key(instance_id: int, generation: int, gateway: str) -> str:
    """Held by a gateway that may send to this instance."""
    return f"{PREFIX}use:{instance_id}:{generation}:{gateway}"


def use_pattern(instance_id: int, generation: int) -> str:
    """SCAN pattern of every gateway's use key of this instance."""
    return f"{PREFIX}use:{instance_id}:{generation}:*"


def telemetry_key(gateway: str) -> str:
    """Where a gateway publishes GatewayTelemetry."""
    return f"{PREFIX}telemetry:{gateway}"


def load_field(model_name: str, part: str) -> str:
    """Field of LOADS; no model name holds a line break."""
    return f"{model_name}\n{part}"


TELEMETRY_PATTERN = PREFIX + "telemetry:*"


def lease_key(name: str) -> str:
    """A fenced lease on a periodic job."""
    return f"{PREFIX}lease:{name}"
