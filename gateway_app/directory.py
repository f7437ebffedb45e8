"""The snapshot's models and backends, assembled from database rows. No I/O; rows are read in snapshot.py.

A Directory is never changed, only replaced. Backends are kept from one to the next while they stand for the same thing (an
instance of the same generation, a remote server at the same address), so the load counted on them survives.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Mapping, MutableMapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal
from urllib.parse import quote

from gateway_app.routing.backends import Backend, Header, Model, Offer
from gateway_app.upstream.origin import Origin
from models_app.contracts.diagnoses import LASTING
from models_app.contracts.traits import TRAITS, EngineTraits, endpoints_of

logger = logging.getLogger(__name__)

READY = "READY"
DRAINING = "DRAINING"
FAILED = "FAILED"
CRASH_LOOP = "CRASH_LOOP"
STOPPED = "STOPPED"
# These serve nobody; what is left decides whether a part has failed.
ENDING = frozenset({DRAINING, "STOPPING", STOPPED})
REMOTE_TRAITS = TRAITS["openai"]
_NO_TRAITS = EngineTraits("", "", frozenset())
Backends = MutableMapping[Hashable, Backend]


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A ModelConfig. roles and parts: see contracts/traits.py. created: Unix seconds."""

    id: int
    name: str
    engine: str
    roles: tuple[str, ...]
    parts: tuple[str, ...]
    ctx_size: int
    enabled: bool
    created: int


@dataclass(frozen=True, slots=True)
class AliasRow:
    """A ModelAlias."""

    id: int
    name: str
    model_id: int


@dataclass(frozen=True, slots=True)
class InstanceRow:
    """An Instance; model_name is the name its process was launched with. secret in clear text."""

    id: int
    model_id: int | None
    model_name: str
    part: str
    engine: str
    state: str
    generation: int
    slots: int
    address: str
    port: int | None
    reason: str
    diagnosis: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class RemoteRow:
    """A RemoteServer of kind openai or assistant. secret in clear text."""

    id: int
    name: str
    kind: str
    address: str
    models: Mapping[str, str]
    weight: float
    enabled: bool
    max_in_flight: int
    created: int
    secret: str = field(repr=False)


@dataclass(slots=True)
class Rows:
    """Every row the directory is made of, by id."""

    models: dict[int, ModelRow] = field(default_factory=dict)
    aliases: dict[int, AliasRow] = field(default_factory=dict)
    instances: dict[int, InstanceRow] = field(default_factory=dict)
    remotes: dict[int, RemoteRow] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Directory:
    """names: every name a client may use, aliases too. models: by their own name. listing: /v1/models, name by name.

    draining: backends kept for their counters, since their instances may return to READY.
    """

    names: Mapping[str, Model] = field(default_factory=dict)
    models: Mapping[str, Model] = field(default_factory=dict)
    backends: Mapping[Hashable, Backend] = field(default_factory=dict)
    listing: Mapping[str, bytes] = field(default_factory=dict)
    draining: tuple[Backend, ...] = ()


def assemble(rows: Rows, known: Backends) -> Directory:
    """The directory of these rows. known: backends of earlier directories still in use; new ones are added to it."""
    backends: dict[Hashable, Backend] = {}
    draining: list[Backend] = []
    local: dict[int, list[Offer]] = {}
    for instance in rows.instances.values():
        if instance.state in (READY, DRAINING) and instance.port is not None and instance.model_id is not None:
            model = rows.models.get(instance.model_id)
            backend = _instance_backend(instance, model.roles if model else (), known)
            if instance.state == DRAINING:
                draining.append(backend)
                continue
            backends[backend.ident] = backend
            local.setdefault(instance.model_id, []).append(Offer(backend, instance.model_name))
    remote: dict[str, list[Offer]] = {}
    created: dict[str, int] = {}
    for server in rows.remotes.values():
        if server.enabled and server.kind == "openai" and server.weight > 0:
            remote_backend = _remote_backend(server, known)
            if remote_backend is None:
                continue
            backends[remote_backend.ident] = remote_backend
            for ours, theirs in server.models.items():
                remote.setdefault(ours, []).append(Offer(remote_backend, theirs))
                created.setdefault(ours, server.created)
    models = _models(rows, local, remote, created)
    names = dict(models)
    for alias in rows.aliases.values():
        row = rows.models.get(alias.model_id)
        if row is not None and row.name in models:
            names.setdefault(alias.name, models[row.name])
    listing = {name: _listed(name, model) for name, model in sorted(names.items())}
    return Directory(names, models, backends, listing, tuple(draining))


def _models(
    rows: Rows, local: Mapping[int, list[Offer]], remote: Mapping[str, list[Offer]], created: Mapping[str, int]
) -> dict[str, Model]:
    """Enabled models, and names only remote servers have. A disabled model hides its name at remote servers too."""
    live: dict[int, list[InstanceRow]] = {}
    for instance in rows.instances.values():
        if instance.model_id is not None and instance.state not in ENDING:
            live.setdefault(instance.model_id, []).append(instance)
    models: dict[str, Model] = {}
    for row in rows.models.values():
        if row.enabled:
            offers = _by_endpoint([*local.get(row.id, ()), *remote.get(row.name, ())])
            models[row.name] = _local_model(row, offers, live.get(row.id, []))
    configured = {row.name for row in rows.models.values()}
    for name in remote.keys() - configured:
        offers = _by_endpoint(remote[name])
        models[name] = Model(name, created[name], frozenset(offers), offers, local=False)
    return models


def _local_model(row: ModelRow, offers: dict[str, tuple[Offer, ...]], live: list[InstanceRow]) -> Model:
    """live: its instances that are not on their way out."""
    served = frozenset().union(*(endpoints_of(part, row.roles) for part in row.parts))
    endpoints = (TRAITS.get(row.engine, _NO_TRAITS).endpoints & served) | frozenset(offers)
    failures: dict[str, str] = {}
    for part in row.parts:
        instances = [instance for instance in live if instance.part == part]
        if instances and all(map(_hopeless, instances)):
            failures[part] = max(instances, key=lambda instance: instance.id).reason
    state: Literal["ready", "loading", "failed", "idle"] = "ready" if offers else "idle"
    if not offers and live:
        state = "failed" if all(map(_hopeless, live)) else "loading"
    return Model(
        row.name, row.created, endpoints, offers,
        local=True, parts=row.parts, failures=failures, state=state, context_length=row.ctx_size,
    )  # fmt: skip


def _hopeless(instance: InstanceRow) -> bool:
    """Given up, or failed for what only somebody's hand can change: requests need not wait for it."""
    return instance.state == CRASH_LOOP or (instance.state == FAILED and instance.diagnosis in LASTING)


def _by_endpoint(offers: list[Offer]) -> dict[str, tuple[Offer, ...]]:
    endpoints = set(chain.from_iterable(offer.backend.targets for offer in offers))
    return {path: tuple(offer for offer in offers if path in offer.backend.targets) for path in endpoints}


def _instance_backend(row: InstanceRow, roles: tuple[str, ...], known: Backends) -> Backend:
    endpoints = TRAITS.get(row.engine, _NO_TRAITS).endpoints & endpoints_of(row.part, roles)
    ident = ("instance", row.id, row.generation, row.address, row.port, endpoints)
    backend = known.get(ident)
    if backend is None:
        backend = known[ident] = Backend(
            name=f"instance:{row.id}:{row.generation}",
            ident=ident,
            origin=Origin(host=row.address, port=row.port or 0, tls=False, server_hostname=None),
            targets={path: path.encode() for path in endpoints},
            headers=_headers(row.secret),
            instance=(row.id, row.generation),
            allowed=False,  # until the control link holds its use key
        )
    backend.slots = max(1, row.slots)
    return backend


def _remote_backend(row: RemoteRow, known: Backends) -> Backend | None:
    """None where the address is no URL: the others go on."""
    ident = ("remote", row.id, row.address, row.secret)
    backend = known.get(ident)
    if backend is None:
        try:
            origin, base = Origin.from_url(row.address)
            headers = _headers(row.secret)
        except ValueError as error:
            logger.warning("Remote server %s is left out: %s", row.name, error)
            return None
        root = quote(base, safe="/%:@!$&'()*+,;=~")
        backend = known[ident] = Backend(
            name=f"remote:{row.name}",
            ident=ident,
            origin=origin,
            targets={path: (root + path.removeprefix("/v1")).encode() for path in REMOTE_TRAITS.endpoints},
            headers=headers,
        )
    backend.name, backend.slots, backend.weight = f"remote:{row.name}", max(1, row.max_in_flight), row.weight
    return backend


def _headers(secret: str) -> tuple[Header, ...]:
    """What every request to this backend carries; the client's own headers are never passed on. Raises ValueError."""
    if not (secret.isascii() and secret.isprintable()):
        raise ValueError("its secret holds characters that no header can carry")
    headers: tuple[Header, ...] = ((b"content-type", b"application/json"), (b"accept-encoding", b"identity"))
    return (*headers, (b"authorization", b"Bearer " + secret.encode())) if secret else headers


def _listed(name: str, model: Model) -> bytes:
    entry: dict[str, Any] = {"id": name, "object": "model", "created": model.created, "owned_by": "assistant"}
    entry |= {"state": model.state, "context_length": model.context_length}
    return json.dumps(entry).encode()
