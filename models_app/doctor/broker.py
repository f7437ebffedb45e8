"""Valkey or Redis: reachable, closed to strangers, set up so that it drops nothing."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import redis
from django.conf import settings
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError
from redis.retry import Retry

from models_app.doctor.exposure import is_loopback
from models_app.doctor.finding import Context, Finding, fail, ok, warn

TIMEOUT_S = 2.0
SLOW_MS = 5.0
FULL_SHARE = 0.9


def check(context: Context) -> Iterable[Finding]:
    target: dict[str, Any] = parse_url(settings.REDIS_URL)  # type: ignore[no-untyped-call]  # redis-py's own
    with _client(target) as client:
        try:
            client.ping()
        except AuthenticationError as error:
            context.missing["broker"] = "the broker refuses our password"
            yield fail(f"The broker refuses our password ({error}).", "Put the right one into REDIS_URL.")
            return
        except (RedisError, OSError) as error:
            context.missing["broker"] = "the broker does not answer"
            yield _unreachable(context, error)
            return
        yield _latency(client)
        yield judge_access(target, open_to_all(target), private_socket(target))
        yield from judge_settings(_facts(client))


def _client(target: Mapping[str, Any]) -> redis.Redis:
    kind = target.get("connection_class", redis.Connection)
    options = {name: value for name, value in target.items() if name != "connection_class"}
    timeouts = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S, "retry": Retry(NoBackoff(), 0)}
    return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=kind, **{**options, **timeouts}))


def _unreachable(context: Context, error: Exception) -> Finding:
    if settings.ASSISTANT_EMBEDDED_VALKEY:
        return context.absent("The embedded Valkey does not answer.", "See logs/valkey.log under ASSISTANT_HOME.")
    return fail(f"The broker of REDIS_URL does not answer ({type(error).__name__}).", "Start it, or correct REDIS_URL.")


def _latency(client: redis.Redis) -> Finding:
    times = []
    for _ in range(20):
        before = time.perf_counter()
        client.ping()
        times.append((time.perf_counter() - before) * 1000)
    info = client.info("server")
    name = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"
    answer = f"{name} answers within {median(times):.2f} ms"
    if median(times) > SLOW_MS:
        return warn(f"{answer}, which is slow.", "Bring it nearer: every process asks it all the time.")
    return ok(f"{answer}.")


def open_to_all(target: Mapping[str, Any]) -> bool:
    """Whether it answers somebody who gives no password."""
    stranger = {name: value for name, value in target.items() if name not in ("username", "password")}
    with _client(stranger) as client:
        try:
            return bool(client.ping())
        except (AuthenticationError, NoPermissionError):
            return False
        except ResponseError as error:
            return not str(error).startswith(("NOAUTH", "DENIED"))
        except (RedisError, OSError):
            return False


def private_socket(target: Mapping[str, Any]) -> bool:
    """Whether it is a Unix socket in a folder that only we may enter."""
    if not target.get("path"):
        return False
    folder = Path(str(target["path"])).parent
    status = folder.stat()
    return status.st_uid == os.getuid() and not stat.S_IMODE(status.st_mode) & 0o077


def judge_access(target: Mapping[str, Any], open_to_strangers: bool, private: bool) -> Finding:
    """Whoever can write to the broker can start processes."""
    if open_to_strangers and not private:
        return fail("The broker has no password, and whoever can write there can start processes.", "Give it one, in REDIS_URL.")
    if target.get("path"):
        return ok(f"The broker is a {'private ' if private else ''}socket{'' if open_to_strangers else ' with a password'}.")
    encrypted = target.get("connection_class") is redis.SSLConnection
    if not encrypted and not is_loopback(str(target.get("host", "localhost"))):
        return warn("The broker is asked over the network without TLS.", "Use a rediss:// address or a private network.")
    return ok("The broker asks for a password.")


def _facts(client: redis.Redis) -> dict[str, Any]:
    """The parts of INFO that matter; those the server does not tell are not there."""
    memory, persistence = client.info("memory"), client.info("persistence")
    facts = {name: memory.get(name) for name in ("maxmemory", "maxmemory_policy", "used_memory")}
    facts["aof_enabled"] = persistence.get("aof_enabled")
    facts["rdb_last_bgsave_status"] = persistence.get("rdb_last_bgsave_status")
    facts["aof_last_write_status"] = persistence.get("aof_last_write_status")
    return {name: value for name, value in facts.items() if value is not None}


def judge_settings(facts: Mapping[str, Any]) -> Iterator[Finding]:
    """Nothing it holds is a record, but tasks that vanish are noticed late."""
    policy, limit = facts.get("maxmemory_policy", "noeviction"), int(facts.get("maxmemory", 0))
    if policy != "noeviction":
        level = fail if limit else warn
        yield level(f"The broker drops keys where memory is short (maxmemory-policy {policy}).", "Set it to noeviction.")
    else:
        yield ok("The broker drops nothing where memory is short (noeviction).")
    if limit and facts.get("used_memory", 0) > FULL_SHARE * limit:
        yield fail("The broker's memory is nearly full, and what no longer fits is refused.", "Raise its maxmemory.")
    if facts.get("aof_enabled"):
        broken = facts.get("aof_last_write_status") == "err"
        yield (
            fail("The broker cannot write its append-only file.", "Look at its disk.")
            if broken
            else ok("The broker keeps queued tasks over its own death (append-only file).")
        )
    else:
        yield warn("The broker forgets queued tasks when it dies; they are ordered again later.", "Set appendonly to yes.")
    if facts.get("rdb_last_bgsave_status") == "err":
        yield warn("The broker could not write its last snapshot.", "Look at its disk.")
