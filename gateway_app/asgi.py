"""The raw ASGI entry of the data plane: /v1, /healthz and /readyz are answered here, everything else by the console."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Awaitable, Callable, Mapping

from gateway_app import errors
from gateway_app.endpoints.http import ClientGone, Receive, Request, Scope, Send
from gateway_app.endpoints.inference import Inference, Parts
from gateway_app.endpoints.models import Models
from gateway_app.endpoints.readiness import Liveness, Readiness
from gateway_app.endpoints.relay import StreamAborted
from models_app.contracts.traits import CHAT, COMPLETIONS, EMBEDDINGS

ASGIApplication = Callable[[Scope, Receive, Send], Awaitable[None]]
Handler = Callable[[Request], Awaitable[None]]
_MODELS = "/v1/models"


class Entry:
    """Routes by exact path; the few paths there are need no pattern."""

    def __init__(self, parts: Parts, readiness: Readiness, console: ASGIApplication) -> None:
        self._console = console
        self._models = Models(parts.keys, parts.directory)
        self._routes: Mapping[str, tuple[str, Handler]] = {
            CHAT: ("POST", Inference(parts, CHAT).handle),
            COMPLETIONS: ("POST", Inference(parts, COMPLETIONS).handle),
            EMBEDDINGS: ("POST", Inference(parts, EMBEDDINGS).handle),
            _MODELS: ("GET", self._models.list),
            "/healthz": ("GET", Liveness().healthz),
            "/readyz": ("GET", readiness.readyz),
        }
        # Ids that no other process and no later life makes again.
        self._id_prefix = f"req-{secrets.token_hex(8)}-"
        self._count = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        route = self._routes.get(path)
        if route is None and not (path.startswith("/v1/") or path == "/v1"):
            await self._console(scope, receive, send)
            return
        request = Request(scope, receive, send, f"{self._id_prefix}{next(self._count):x}")
        try:
            await self._dispatch(request, route)
        except errors.ApiError as error:
            await request.fail(error)
        except ClientGone:
            return
        except StreamAborted as reason:
            # Our servers cut the connection, and log this as what it is: no fault of the application.
            raise ConnectionAbortedError(f"{request.id}: {reason}") from None

    async def _dispatch(self, request: Request, route: tuple[str, Handler] | None) -> None:
        if route is None:
            await self._one_model(request)
            return
        method, handler = route
        if request.method != method:
            raise errors.method_not_allowed(request.method, (method,))
        await handler(request)

    async def _one_model(self, request: Request) -> None:
        name = request.path.removeprefix(_MODELS + "/")
        if name == request.path or not name:
            raise errors.unknown_path(request.path)
        if request.method != "GET":
            raise errors.method_not_allowed(request.method, ("GET",))
        await self._models.retrieve(request, name)
