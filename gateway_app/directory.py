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
from typing import Any
from urllib.parse import quote

from gateway_app.routing.backends import Backend, Header, Model, Offer
from gateway_app.upstream.origin import Origin
from models_app.contracts.traits import TRAITS, EngineTraits, endpoints_of

logger = logging.getLogger(__name__)

READY = "READY"
CRASH_LOOP = "CRASH_LOOP"
STOPPED = "STOPPED"
# States after which this instance serves nobody again; what is left decides whether a model has failed for good.
ENDING = frozenset({"DRAINING", "STOPPING", STOPPED})
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
    """names: every name a client may use, aliases too. models: by their own name. listing: /v1/models, name by name."""

    names: Mapping[str, Model] = field(default_factory=dict)
    models: Mapping[str, Model] = field(default_factory=dict)
    backends: Mapping[Hashable, Backend] = field(default_factory=dict)
    listing: Mapping[str, bytes] = field(default_factory=dict)


def assemble(rows: Rows, known: Backends) -> Directory:
    """The directory of these rows. known: backends of earlier directories still in use; new ones are added to it."""
    backends: dict[Hashable, Backend] = {}
    local: dict[int, list[Offer]] = {}
    for instance in rows.instances.values():
        if instance.state == READY and instance.port is not None and instance.model_id is not None:
            model = rows.models.get(instance.model_id)
            backend = _instance_backend(instance, model.roles if model else (), known)
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
    return Directory(names, models, backends, {name: _listed(name, model) for name, model in sorted(names.items())})


def _models(
    rows: Rows, local: Mapping[int, list[Offer]], remote: Mapping[str, list[Offer]], created: Mapping[str, int]
) -> dict[str, Model]:
    """Enabled models, and names only remote servers have. A disabled model hides its name at remote servers too."""
    failures = _failures(rows)
    models: dict[str, Model] = {}
    for row in rows.models.values():
        if row.enabled:
            elsewhere = remote.get(row.name, [])
            offers = _by_endpoint([*local.get(row.id, ()), *elsewhere])
            served = frozenset().union(*(endpoints_of(part, row.roles) for part in row.parts))
            endpoints = (TRAITS.get(row.engine, _NO_TRAITS).endpoints & served) | frozenset(offers)
            failure = None if elsewhere else failures.get(row.id)
            models[row.name] = Model(row.name, row.created, endpoints, offers, local=True, failure=failure)
    configured = {row.name for row in rows.models.values()}
    for name in remote.keys() - configured:
        offers = _by_endpoint(remote[name])
        models[name] = Model(name, created[name], frozenset(offers), offers, local=False)
    return models


def _failures(rows: Rows) -> dict[int, str]:
    """Why, for models that have instances and all of them given up."""
    states: dict[int, list[InstanceRow]] = {}
    for instance in rows.instances.values():
        if instance.model_id is not None and instance.state not in ENDING:
            states.setdefault(instance.model_id, []).append(instance)
    return {
        model_id: max(instances, key=lambda instance: instance.id).reason
        for model_id, instances in states.items()
        if all(instance.state == CRASH_LOOP for instance in instances)
    }


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
    return json.dumps(entry).encode()
