"""No Django routes: the gateway is a raw ASGI application, everything else is relayed to the console."""

urlpatterns: list[object] = []
