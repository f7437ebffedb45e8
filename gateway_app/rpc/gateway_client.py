"""The gRPC sidecar's way to the gateway on this machine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

import grpc

from gateway_app.rpc.forwarding import HttpRequest, Refused
from gateway_app.upstream.http import BodyTooLarge, ConnectFailed, Origin, UpstreamFailure, UpstreamPool, UpstreamResponse

_WILDCARDS: Mapping[str, str] = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # compared, never bound


def loopback_origin(host: str, port: int) -> Origin:
    """Where a gateway that listens on this address is reached from the same machine."""
    return Origin(_WILDCARDS.get(host, host), port)


class GatewayClient:
    """Use as an async context manager."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._pool = UpstreamPool()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._pool.close()

    @property
    def address(self) -> str:
        """For messages: http://host:port."""
        return f"http://{self._origin.host_header.decode()}"

    @asynccontextmanager
    async def answer(self, request: HttpRequest) -> AsyncIterator[UpstreamResponse]:
        """The gateway's answer, its body still to be read. Leaving early, by cancellation too, closes the connection at once.

        Refused where there is no answer, where it breaks off, and where its reader found it too long.
        """
        headers = [(name.encode("ascii"), value.encode()) for name, value in request.headers.items()]
        try:
            response = await self._pool.send(
                self._origin, request.method.encode("ascii"), request.path.encode("ascii"), headers, request.body
            )
            try:
                yield response
            finally:
                response.abort()  # of no effect once the body was read to its end
        except ConnectFailed as error:
            raise Refused(
                grpc.StatusCode.UNAVAILABLE, f"The gateway at {self.address} is not reachable; try again when it is up."
            ) from error
        except BodyTooLarge as error:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "The answer is too long for one message; use ForwardRequestStream."
            ) from error
        except UpstreamFailure as error:
            raise Refused(
                grpc.StatusCode.INTERNAL, "The gateway broke off before its answer was complete; the request may have run."
            ) from error
