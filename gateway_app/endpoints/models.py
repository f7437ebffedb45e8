"""`/v1/models` and `/v1/models/{id}`: the models a key may name, under every name they have."""

from __future__ import annotations

from collections.abc import Callable

from gateway_app import errors
from gateway_app.directory import Directory
from gateway_app.endpoints.http import Request
from gateway_app.keys import KeyRecord, Keys


class Models:
    """Answers from the snapshot; what a key may not use does not exist."""

    def __init__(self, keys: Keys, directory: Callable[[], Directory]) -> None:
        self._keys = keys
        self._directory = directory

    async def list(self, request: Request) -> None:
        """All of them."""
        key = await self._keys.authenticate(request.headers)
        directory = self._directory()
        entries = [entry for name, entry in directory.listing.items() if _allowed(key, directory, name)]
        await request.answer(b'{"object": "list", "data": [' + b", ".join(entries) + b"]}")

    async def retrieve(self, request: Request, name: str) -> None:
        """One of them; the name may contain slashes."""
        key = await self._keys.authenticate(request.headers)
        directory = self._directory()
        if name not in directory.listing or not _allowed(key, directory, name):
            raise errors.model_not_found(name)
        await request.answer(directory.listing[name])


def _allowed(key: KeyRecord, directory: Directory, name: str) -> bool:
    return key.allows(name, directory.names[name].name)
