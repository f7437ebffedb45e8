"""Who a request really comes from: the X-Forwarded-* headers we pass on, and whose we believe. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Headers = Iterable[tuple[bytes, bytes]]


class ForwardedHeaders:
    """Makes our own X-Forwarded-* headers. What a client sent of them counts only where the peer is a trusted proxy."""

    def __init__(self, trusted_proxies: Iterable[str]) -> None:
        """Addresses or networks such as 10.0.0.0/8; raises ValueError on anything else."""
        self._trusted: tuple[Network, ...] = tuple(ipaddress.ip_network(proxy, strict=False) for proxy in trusted_proxies)

    def trusts(self, address: str) -> bool:
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(ip in network for network in self._trusted)

    def of(self, scope: Mapping[str, Any]) -> list[tuple[str, str]]:
        """For, Port (both the client's, as Daphne reads them), Proto and Host of this ASGI scope's request."""
        peer, port = scope.get("client") or ("", 0)
        proto = "https" if scope.get("scheme") in ("https", "wss") else "http"
        sent = _values(scope["headers"])
        host = sent.get(b"host", "")
        if self.trusts(peer):
            client = self._client_behind(peer, sent.get(b"x-forwarded-for", ""))
            port = port if client == peer else 0
            peer = client
            said = sent.get(b"x-forwarded-proto", "").lower()
            proto = said if said in ("http", "https") else proto
            host = sent.get(b"x-forwarded-host") or host
        return [
            ("X-Forwarded-For", peer),
            ("X-Forwarded-Port", str(port)),
            ("X-Forwarded-Proto", proto),
            ("X-Forwarded-Host", host),
        ]

    def _client_behind(self, peer: str, chain: str) -> str:
        """The last address of the chain that is no trusted proxy: what stands left of it is the client's own claim."""
        client = peer
        for address in reversed([part.strip() for part in chain.split(",") if part.strip()]):
            client = address
            if not self.trusts(address):
                break
        return client


def _values(headers: Headers) -> dict[bytes, str]:
    """Each header once; repeated ones joined by commas."""
    values: dict[bytes, str] = {}
    for name, value in headers:
        text = value.decode("latin-1")
        values[name] = f"{values[name]},{text}" if name in values else text
    return values
