"""The console's ASGI application: Django for HTTP, Channels for WebSockets."""

from __future__ import annotations

import os

from channels.auth import AuthMiddlewareStack
from channels.routing import ProtocolTypeRouter, URLRouter
from channels.security.websocket import AllowedHostsOriginValidator
from django.core.asgi import get_asgi_application
from django.urls import re_path

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "assistant_site.settings")

# Sets Django up; what follows may need its models.
http_application = get_asgi_application()

from assistant_site.asgi_types import Receive, Scope, Send  # noqa: E402
from assistant_site.celery import app as celery_app  # noqa: E402  # tasks enqueued here go to our broker

NOT_FOUND = 4404  # our close code for a path that nobody serves

__all__ = ["application", "celery_app"]


async def unknown_path(scope: Scope, receive: Receive, send: Send) -> None:
    """Accepts and closes at once, so that the browser's script sees the code; a refused handshake shows it none."""
    await receive()  # websocket.connect
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.close", "code": NOT_FOUND, "reason": "Nobody serves this path."})


websocket_urlpatterns = [re_path(r"", unknown_path)]  # type: ignore[arg-type]  # Channels routes ASGI applications

application = ProtocolTypeRouter(
    {
        "http": http_application,
        "websocket": AllowedHostsOriginValidator(AuthMiddlewareStack(URLRouter(websocket_urlpatterns))),
    }
)
