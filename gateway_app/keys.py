"""Who is asking: the table of keys in memory, and the check of the key a request brings. No database on this path.

Every row is in the table, revoked and expired ones too: a key known to be dead is refused at once, and only a key that was
never seen is worth a look at the database.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from gateway_app import errors
from models_app.contracts import key_material

INFERENCE = "inference"
_BEARER = b"bearer "


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One APIKey row. models: None allows all. expires_at: Unix seconds. usable: not revoked, and its user is active."""

    id: int
    digest: bytes
    public_id: str
    user_id: int
    user_name: str
    scopes: frozenset[str]
    models: frozenset[str] | None
    expires_at: float | None
    usable: bool
    rpm: int | None
    tpm: int | None
    parallel: int | None
    monthly_tokens: int | None
    priority: str
    weight: float
    private: bool

    def valid(self, now: float) -> bool:
        """Whether it opens anything at this Unix time."""
        return self.usable and (self.expires_at is None or now < self.expires_at)

    def allows(self, *names: str) -> bool:
        """Whether it may use a model known by these names."""
        return self.models is None or not self.models.isdisjoint(names)


class KeyTable:
    """Key records by the SHA-256 of the key. Owned by the event loop once it is in use."""

    def __init__(self, records: Iterable[KeyRecord] = ()) -> None:
        self._by_digest: dict[bytes, KeyRecord] = {}
        self._digests: dict[int, bytes] = {}
        self.apply(records, ())

    def __len__(self) -> int:
        return len(self._by_digest)

    def apply(self, changed: Iterable[KeyRecord], removed: Iterable[int]) -> None:
        """Take over changed and new rows, forget deleted ones."""
        for record in changed:
            old = self._digests.get(record.id)
            if old is not None and old != record.digest:
                del self._by_digest[old]
            self._by_digest[record.digest] = record
            self._digests[record.id] = record.digest
        for row_id in removed:
            digest = self._digests.pop(row_id, None)
            if digest is not None:
                del self._by_digest[digest]

    def find(self, text: str) -> KeyRecord | None:
        """The record of a key as it was sent."""
        return self._by_digest.get(bytes.fromhex(key_material.digest(text)))


class Recheck(Protocol):
    """Compares with the database once for all who ask, at most a second; whether the table is now known to be current."""

    def __call__(self) -> Awaitable[bool]: ...


class Keys:
    """Checks keys against the table in use."""

    def __init__(self, recheck: Recheck, clock: Callable[[], float] = time.time) -> None:
        self.table = KeyTable()
        self._recheck = recheck
        self._clock = clock

    async def authenticate(self, headers: Iterable[tuple[bytes, bytes]], scope: str = INFERENCE) -> KeyRecord:
        """The record of the key in the Authorization header. Raises the ApiError of a key that is missing, bad or too weak."""
        text = _presented(headers)
        # Looked up first: what is in the table is well-formed, and the look-up is cheaper than the checksum.
        record = self.table.find(text)
        if record is None:
            record = await self._find_unknown(text)
        if not record.valid(self._clock()):
            raise errors.invalid_key(key_material.masked(text))
        if scope not in record.scopes:
            raise errors.insufficient_permissions(scope)
        return record

    async def _find_unknown(self, text: str) -> KeyRecord:
        if not key_material.well_formed(text):
            raise errors.invalid_key(key_material.masked(text))
        current = await self._recheck()
        record = self.table.find(text)
        if record is not None:
            return record
        raise errors.invalid_key(key_material.masked(text)) if current else errors.auth_backend_unavailable()


def _presented(headers: Iterable[tuple[bytes, bytes]]) -> str:
    for name, value in headers:
        if name == b"authorization":
            if value[:7].lower() == _BEARER and (text := value[7:].strip()):
                return text.decode("utf-8", "surrogateescape")
            break
    raise errors.missing_key()
