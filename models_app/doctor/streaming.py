"""Does a stream arrive as it is sent? Asks the gateway, through whatever stands before it, for events 100 ms apart."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import httpx
from django.conf import settings

from models_app.doctor.finding import Context, Finding, fail, ok

EVENTS = 5
SPACING_S = 0.1
TIMEOUT_S = 10.0
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # names, nothing is bound here


class Unlike(Exception):
    """What answered is no stream of ours; str() says what it is."""


def check(context: Context) -> Iterable[Finding]:
    url = context.public_url.rstrip("/") or own_url()
    try:
        # A proxy of the environment is on no client's way to our own address.
        arrivals = arrivals_at(f"{url}/healthz?stream={EVENTS}", trust_env=bool(context.public_url))
    except Unlike as error:
        yield fail(f"{url} does not answer as a gateway does: {error}.", "Check --public-url and the proxy's routes.")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        text = f"{url} cannot be reached ({str(error).rstrip('.') or type(error).__name__})."
        remedy = "Check --public-url, the proxy and its certificate."
        yield fail(text, remedy) if context.public_url else context.absent(text, "See logs/gateway.log under ASSISTANT_HOME.")
    else:
        yield judge(url, arrivals)


def own_url() -> str:
    host, port = settings.ASSISTANT_HTTP_ADDR
    host = LOOPBACK.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def arrivals_at(url: str, trust_env: bool) -> list[float]:
    """When each event came, by the monotonic clock. Raises Unlike and httpx's errors."""
    arrivals: list[float] = []
    with httpx.Client(timeout=TIMEOUT_S, trust_env=trust_env) as client, client.stream("GET", url) as reply:
        kind = reply.headers.get("content-type", "nothing")
        if reply.status_code != httpx.codes.OK:
            raise Unlike(f"its status is {reply.status_code}")
        if not kind.startswith("text/event-stream"):
            raise Unlike(f"it sends {kind} instead of an event stream")
        rest = b""
        for piece in reply.iter_bytes():
            *events, rest = (rest + piece).split(b"\n\n")
            arrivals += [time.monotonic()] * len(events)
    return arrivals


def judge(url: str, arrivals: Sequence[float]) -> Finding:
    """Events that were sent one by one and come together were gathered on the way."""
    if len(arrivals) != EVENTS:
        return fail(f"Of {EVENTS} events {len(arrivals)} came through {url}.", "Look for a proxy that cuts streams off.")
    took, sent = arrivals[-1] - arrivals[0], SPACING_S * (EVENTS - 1)
    if took < sent / 2:
        return fail(
            f"Events sent over {sent:.1f} s came through {url} within {took:.2f} s: something on the way buffers.",
            "Switch response buffering off for /v1 (nginx: proxy_buffering off).",
        )
    return ok(f"Streams come through {url} event by event.")
