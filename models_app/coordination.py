"""What the control plane says and hears through Valkey or Redis. Nothing here is a record; names are in contracts/."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypedDict, cast

import redis
from django.conf import settings
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.retry import Retry

from models_app.contracts.coordination import (
    EVENTS,
    PREFIX,
    TELEMETRY_PATTERN,
    GatewayTelemetry,
    RevisionHint,
    lease_key,
    use_pattern,
)
from models_app.exceptions import CoordinationUnavailable

log = logging.getLogger(__name__)

# Compare, then delete or prolong: a lease that has passed to somebody else is not touched.
_RELEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) else return 0 end"
_RENEW = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('pexpire', KEYS[1], ARGV[2]) else return 0 end"


@lru_cache(maxsize=1)
def client() -> redis.Redis:
    """One connection pool per process; it notices a fork by itself."""
    # With redis-py's own retries a missing server would block a caller for seconds. One retry mends a connection that was
    # closed while it lay in the pool; a server that hangs is not asked twice.
    retry = Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,))
    return redis.Redis.from_url(settings.REDIS_URL, socket_timeout=1.0, socket_connect_timeout=1.0, retry=retry)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise CoordinationUnavailable(f"Valkey does not answer ({type(error).__name__}); is it running?") from error


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()


def ping() -> None:
    """Raises CoordinationUnavailable where nobody answers within a second."""
    with _translated():
        client().ping()


def publish_revision() -> None:
    """Hasten the gateways' next look at the revision. They look every second anyway, so a failure is only noted."""
    hint: RevisionHint = {"type": "revision"}
    try:
        with _translated():
            client().publish(EVENTS, json.dumps(hint))
    except CoordinationUnavailable as error:
        log.debug("No revision hint: %s", error)


def users(instance_id: int, generation: int) -> list[str]:
    """Gateways that may send to this instance. Raises CoordinationUnavailable: then nobody knows."""
    with _translated():
        keys = client().scan_iter(match=use_pattern(instance_id, generation), count=1000)
        return sorted(_text(key).rpartition(":")[2] for key in keys)


def telemetry() -> list[GatewayTelemetry]:
    """What every live gateway last said. Raises CoordinationUnavailable."""
    with _translated():
        keys = list(client().scan_iter(match=TELEMETRY_PATTERN, count=1000))
        values = client().mget(keys) if keys else []
    return [cast(GatewayTelemetry, json.loads(value)) for value in values if value is not None]


def use_holders() -> dict[str, set[str]]:
    """Gateways that may send to an instance, by "<instance id>:<generation>". Raises CoordinationUnavailable."""
    prefix, found = f"{PREFIX}use:", dict[str, set[str]]()
    with _translated():
        for key in client().scan_iter(match=f"{prefix}*", count=1000):
            instance_id, generation, gateway = _text(key).removeprefix(prefix).split(":", 2)
            found.setdefault(f"{instance_id}:{generation}", set()).add(gateway)
    return found


def read_hash(name: str) -> dict[str, Any]:
    """Fields of a hash whose values are JSON; empty where there is none. Raises CoordinationUnavailable."""
    with _translated():
        values = client().hgetall(name)
    return {_text(field): json.loads(value) for field, value in values.items()}


def replace_hash(name: str, values: Mapping[str, Any], life_ms: int) -> None:
    """Write a hash whole, its values as JSON; readers see the old one or the new one. Raises CoordinationUnavailable."""
    with _translated(), client().pipeline(transaction=True) as pipeline:
        pipeline.delete(name)
        if values:
            pipeline.hset(name, mapping={field: json.dumps(value) for field, value in values.items()})
            pipeline.pexpire(name, life_ms)
        pipeline.execute()


def set_in_hash(name: str, field: str, value: Any, life_ms: int) -> None:
    """Write one field of such a hash and prolong the life of all. Raises CoordinationUnavailable."""
    with _translated(), client().pipeline(transaction=True) as pipeline:
        pipeline.hset(name, field, json.dumps(value))
        pipeline.pexpire(name, life_ms)
        pipeline.execute()


@dataclass(frozen=True, slots=True)
class Lease:
    """A right that only one holder has at a time, until it is released or its life ends."""

    name: str
    token: str

    def renew(self, life_ms: int) -> bool:
        """Prolong it; False where it has passed to somebody else. Raises CoordinationUnavailable."""
        with _translated():
            return bool(client().eval(_RENEW, 1, lease_key(self.name), self.token, life_ms))

    def release(self) -> None:
        """Give it back; one that cannot be given back ends by itself."""
        try:
            with _translated():
                client().eval(_RELEASE, 1, lease_key(self.name), self.token)
        except CoordinationUnavailable as error:
            log.debug("Lease %s left to expire: %s", self.name, error)


def acquire(name: str, life_ms: int, token: str | None = None) -> Lease | None:
    """The lease, or None where somebody holds it. Raises CoordinationUnavailable."""
    lease = Lease(name, token or secrets.token_urlsafe(12))
    with _translated():
        return lease if client().set(lease_key(name), lease.token, nx=True, px=life_ms) else None


def holder(name: str) -> str | None:
    """The token of whoever holds this lease, None where nobody does. Raises CoordinationUnavailable."""
    with _translated():
        token = client().get(lease_key(name))
    return None if token is None else _text(token)


def node_key(name: str) -> str:
    """Present while this node's worker beats."""
    return f"{PREFIX}node:{name}"


def node_beat(name: str, life_ms: int) -> None:
    """Say that this node's worker lives. Raises CoordinationUnavailable."""
    with _translated():
        client().set(node_key(name), "1", px=life_ms)


def beating_nodes(names: list[str]) -> set[str]:
    """Those of the named nodes whose worker was heard lately. Raises CoordinationUnavailable."""
    with _translated():
        values = client().mget([node_key(name) for name in names]) if names else []
    return {name for name, value in zip(names, values, strict=True) if value is not None}


def _failures_key(instance_id: int, generation: int) -> str:
    return f"{PREFIX}probe-failures:{instance_id}:{generation}"


def count_probe_failure(instance_id: int, generation: int, life_ms: int) -> int:
    """One more failed probe in a row; the count so far. Raises CoordinationUnavailable."""
    key = _failures_key(instance_id, generation)
    with _translated(), client().pipeline() as pipeline:
        pipeline.incr(key)
        pipeline.pexpire(key, life_ms)
        count, _ = pipeline.execute()
    return int(count)


def forget_probe_failures(instance_id: int, generation: int) -> None:
    """A probe succeeded. Raises CoordinationUnavailable."""
    with _translated():
        client().delete(_failures_key(instance_id, generation))


def _track_key(instance_id: int, generation: int) -> str:
    return f"{PREFIX}track:{instance_id}:{generation}"


def work_track(instance_id: int, generation: int) -> list[Any] | None:
    """What was remembered of this process's work at the last look, None where nothing is. Raises CoordinationUnavailable."""
    with _translated():
        value = client().get(_track_key(instance_id, generation))
    return None if value is None else cast(list[Any], json.loads(value))


def keep_work_track(instance_id: int, generation: int, track: list[Any], life_ms: int) -> None:
    """Remember it until the next look, life_ms at most. Raises CoordinationUnavailable."""
    with _translated():
        client().set(_track_key(instance_id, generation), json.dumps(track), px=life_ms)


def forget_work_track(instance_id: int, generation: int) -> None:
    """It has no work any more. Raises CoordinationUnavailable."""
    with _translated():
        client().delete(_track_key(instance_id, generation))


class HealthReport(TypedDict):
    """What the last look at a process found, for people."""

    verdict: str
    detail: str
    at: float  # Unix time


def _health_key(instance_id: int, generation: int) -> str:
    return f"{PREFIX}health:{instance_id}:{generation}"


def report_health(instance_id: int, generation: int, report: HealthReport, life_ms: int) -> None:
    """Say how a process is doing. Raises CoordinationUnavailable."""
    with _translated():
        client().set(_health_key(instance_id, generation), json.dumps(report), px=life_ms)


def health_reports(instances: Sequence[tuple[int, int]]) -> list[HealthReport | None]:
    """The last reports on these (id, generation), in their order. Raises CoordinationUnavailable."""
    with _translated():
        values = client().mget([_health_key(*one) for one in instances]) if instances else []
    return [None if value is None else cast(HealthReport, json.loads(value)) for value in values]
