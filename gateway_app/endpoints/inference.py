"""Chat completions and completions: key → body → model → limits → slot → backend → answer → usage, streamed or not.

A backend that fails before the first byte is left for another, at most twice and never for the same one. Everything a
request holds is given back by Exchange.finish in the one `finally` of `handle`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from gateway_app import errors
from gateway_app.directory import Directory
from gateway_app.endpoints.body import Call, parse
from gateway_app.endpoints.exchange import Exchange
from gateway_app.endpoints.http import ClientGone, Request
from gateway_app.endpoints.interruption import Reason
from gateway_app.endpoints.relay import Patience, SlowReaders, StreamAborted
from gateway_app.endpoints.waiting import WaitingRoom, deadline
from gateway_app.keys import KeyRecord, Keys
from gateway_app.limits import Limits
from gateway_app.metering import Meter
from gateway_app.routing.backends import Backend, Model
from gateway_app.routing.slots import Slots
from gateway_app.sse import StreamScanner, read_embedding_usage, read_usage, splice_model
from gateway_app.upstream.http import BodyTooLarge, ConnectFailed, UpstreamBroken, UpstreamFailure, UpstreamPool, UpstreamResponse
from models_app.contracts.traits import CHAT, COMPLETIONS, EMBEDDINGS

logger = logging.getLogger(__name__)

TRIES = 3
MAX_ANSWER = 64 * 1024 * 1024  # bytes of a plain answer
MAX_ERROR = 64 * 1024  # bytes of an engine's error that are read
MAX_COMMENTS = 64 * 1024  # bytes of comments before the first event that are kept for the client
_DONE = b"data: [DONE]\n\n"
_ELSEWHERE = frozenset({429, 500, 502, 503, 504})  # of a backend that another one may not have
_PROMPTS = {CHAT: "messages", COMPLETIONS: "prompt", EMBEDDINGS: "input"}  # the field that holds what the model reads
_ACCEPT_JSON = (b"accept", b"application/json")
_ACCEPT_STREAM = (b"accept", b"text/event-stream")


@dataclass(frozen=True, slots=True)
class Parts:
    """What the endpoints work with. directory: the one in use now. recheck: bring it up to date first (Feed.recheck).
    unreachable: told of a backend that nothing listens at.
    """

    directory: Callable[[], Directory]
    recheck: Callable[[], Awaitable[bool]]
    keys: Keys
    limits: Limits
    meter: Meter
    slots: Slots
    waiting_room: WaitingRoom
    pool: UpstreamPool
    readers: SlowReaders
    patience: Patience
    unreachable: Callable[[Backend], None]
    max_body: int  # bytes
    max_wait_s: float


class Inference:
    """One endpoint that models answer."""

    def __init__(self, parts: Parts, endpoint: str) -> None:
        self._parts = parts
        self._endpoint = endpoint
        self._prompt = _PROMPTS[endpoint]
        self._read_usage = read_embedding_usage if endpoint == EMBEDDINGS else read_usage

    async def handle(self, request: Request) -> None:
        """Answer. Raises ApiError where nothing was sent yet, ClientGone, and StreamAborted where something was."""
        exchange = await self._admit(request)
        try:
            await self._serve_or_tell(exchange)
        except asyncio.CancelledError:
            reason = exchange.interruption.reason
            if reason is None:
                exchange.failed(0, "error", "gateway_stopped")
                raise
            _uncancel()
            if reason is Reason.CLIENT_GONE:
                exchange.failed(0, "client_gone", "")
                raise ClientGone from None
            exchange.failed(0, "error", "slow_reader")
            raise StreamAborted("The client stopped reading.") from None
        finally:
            exchange.finish()

    async def _serve_or_tell(self, exchange: Exchange) -> None:
        """Where the status is out already, an error becomes an event and the stream is given up."""
        try:
            await self._serve(exchange)
        except errors.ApiError as error:
            exchange.failed(error.status, "error", error.code or "")
            if exchange.outlet is None or not exchange.committed:
                raise
            await exchange.outlet.write(error.event())
            raise StreamAborted(error.message) from None

    async def _admit(self, request: Request) -> Exchange:
        parts = self._parts
        key = await parts.keys.authenticate(request.headers)
        call = parse(await request.body(parts.max_body), self._endpoint)
        model = await self._current_model(call, key)
        return Exchange(
            request, key, call, model, self._endpoint,
            limits=parts.limits, meter=parts.meter, slots=parts.slots, readers=parts.readers, patience=parts.patience,
        )  # fmt: skip

    async def _current_model(self, call: Call, key: KeyRecord) -> Model:
        """One that was made a moment ago is not unknown. Asked for the forbidden ones too, so that they take as long."""
        if not self._knows(call, key):
            await self._parts.recheck()
        return self._model(call, key)

    def _knows(self, call: Call, key: KeyRecord) -> bool:
        model = self._parts.directory().names.get(call.model)
        return model is not None and key.allows(call.model, model.name)

    def _model(self, call: Call, key: KeyRecord) -> Model:
        if not self._knows(call, key):
            raise errors.model_not_found(call.model)
        directory = self._parts.directory()
        model = directory.names[call.model]
        if self._endpoint not in model.endpoints:
            able = [name for name, other in directory.models.items() if self._endpoint in other.endpoints and key.allows(name)]
            raise errors.unsupported_endpoint(self._endpoint, call.model, sorted(able)[:20])
        return model

    async def _serve(self, exchange: Exchange) -> None:
        attempt = self._plain if exchange.outlet is None else self._stream
        for tries_left in reversed(range(TRIES)):
            await self._seat(exchange)
            refused = False
            try:
                await attempt(exchange)
                return
            except UpstreamFailure as failure:
                refused = isinstance(failure, ConnectFailed)
                error = errors.upstream_error()
                logger.warning("%s failed before its first byte: %s", exchange.outcome.backend, failure)
            except errors.ApiError as answer:
                if exchange.begun or answer.status not in _ELSEWHERE:
                    raise
                error = answer
                logger.warning("%s refused: %d %s", exchange.outcome.backend, answer.status, answer.code)
            backend = exchange.give_up_backend()
            if refused:
                self._parts.unreachable(backend)
            if not tries_left or not self._another(exchange, refused):
                raise error

    async def _seat(self, exchange: Exchange) -> None:
        """A slot at a backend that has not failed this request, now or in turn."""
        parts, endpoint, excluded = self._parts, self._endpoint, exchange.excluded
        model = exchange.model
        if excluded:
            model = exchange.model = self._model(exchange.call, exchange.key)  # there may be new backends by now
        offer = parts.slots.take(model, endpoint, excluded)
        if offer is None:
            until = deadline(exchange.request, exchange.call.stream, parts.max_wait_s)
            offer = await parts.waiting_room.wait(model, endpoint, excluded, until, exchange.key)
        exchange.seat(offer)

    def _another(self, exchange: Exchange, refused: bool) -> bool:
        """Whether a further try makes sense. A process that is not there is being restarted, and worth waiting for; one that
        broke with this request in its hands is not: it might break the next one too.
        """
        model = self._parts.directory().models.get(exchange.model.name)
        if model is None:
            return False
        offers = model.offers.get(self._endpoint, ())
        return (refused and model.local) or any(offer.backend not in exchange.excluded for offer in offers)

    async def _send(self, exchange: Exchange) -> UpstreamResponse:
        """The head of a good answer. Raises UpstreamFailure, or what the engine refused with, translated."""
        offer, call = exchange.offer, exchange.call
        assert offer is not None
        backend = offer.backend
        headers = (
            *backend.headers,
            _ACCEPT_STREAM if call.stream else _ACCEPT_JSON,
            (b"x-request-id", exchange.request.shown_id),
        )
        body = call.body_for(offer.model_name)
        response = await self._parts.pool.send(backend.origin, b"POST", backend.targets[self._endpoint], headers, body)
        exchange.response = response
        if response.status != 200:
            raise errors.from_engine(response.status, _error_member(await response.read(MAX_ERROR)), self._prompt)
        return response

    async def _plain(self, exchange: Exchange) -> None:
        response = await self._send(exchange)
        try:
            body = await response.read(MAX_ANSWER)
        except BodyTooLarge:
            exchange.begun = True  # no other backend would say less
            raise errors.upstream_error() from None
        exchange.saw_bytes(time.monotonic())
        try:
            exchange.outcome.usage, finish_reason = self._read_usage(body)
        except ValueError:  # an error, a page, a stream, half an answer
            raise errors.from_engine(200, _error_member(body), self._prompt) from None
        exchange.begun = True
        exchange.interruption.close()
        await exchange.request.answer(_named(body, exchange.call.model))
        exchange.completed(finish_reason)

    async def _stream(self, exchange: Exchange) -> None:
        response = await self._send(exchange)
        scanner = StreamScanner(exchange.call.model, exchange.call.wants_usage)
        async with aclosing(response.chunks()) as chunks:
            first = await _first_event(scanner, chunks, self._prompt)
            exchange.begun = True
            try:
                await self._relay(exchange, scanner, chunks, first)
            except UpstreamBroken as failure:
                logger.warning("%s broke off in the middle of a stream: %s", exchange.outcome.backend, failure)
                raise errors.upstream_stream_interrupted() from None
            finally:
                exchange.outcome.usage = scanner.usage

    async def _relay(self, exchange: Exchange, scanner: StreamScanner, chunks: AsyncGenerator[bytes, None], out: bytes) -> None:
        """Pass events on until [DONE]. Raises UpstreamBroken where it never comes, and the engine's own error."""
        outlet = exchange.outlet
        assert outlet is not None
        while True:
            exchange.saw_bytes(time.monotonic())
            if exchange.first_at is None and scanner.saw_content:
                exchange.first_at = time.monotonic()
                outlet.content_flows()
            if scanner.done:
                break
            if out:
                await outlet.write(out)
            if scanner.error is not None:
                raise errors.from_engine(200, scanner.error, self._prompt)
            data = await anext(chunks, None)
            if data is None:
                out = scanner.finish()
                if not scanner.done:
                    if scanner.finish_reason is None and not scanner.overflowed:
                        raise UpstreamBroken("the stream ended without a finish")
                    out = _ended(out) + _DONE  # it ended properly and only forgot to say so
                break
            out = scanner.feed(data)
        exchange.interruption.close()
        outlet.content_flows()
        await outlet.write(out, last=True)
        exchange.completed(scanner.finish_reason)


async def _first_event(scanner: StreamScanner, chunks: AsyncGenerator[bytes, None], prompt: str) -> bytes:
    """What to relay once the first event is whole. Raises UpstreamBroken where none comes, else the error if it is one."""
    held = b""
    async for data in chunks:
        held += scanner.feed(data)
        if scanner.saw_event:
            break
        if len(held) > MAX_COMMENTS:
            held = b""
    else:
        held += scanner.finish()
    if scanner.error is not None and b"data:" not in held:  # comments are no answer
        raise errors.from_engine(200, scanner.error, prompt)
    if not scanner.saw_event:
        raise UpstreamBroken("the stream ended before its first event")
    return held


def _named(body: bytes, name: str) -> bytes:
    """The answer under the name the client used. Looked for first: where the one "model" there is says so, nothing is parsed."""
    quoted = json.dumps(name).encode()
    if body.count(b'"model"') == 1 and (b'"model":' + quoted in body or b'"model": ' + quoted in body):
        return body
    return splice_model(body, name)


def _ended(events: bytes) -> bytes:
    """The events with a blank line after the last, which the end of a stream may lack."""
    return events if not events or events.endswith((b"\n\n", b"\r\n\r\n")) else events.rstrip(b"\r\n") + b"\n\n"


def _error_member(body: bytes) -> object:
    """What an engine's answer has as "error"; the whole of it, as a text, if it is no JSON object."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")
    return parsed.get("error") if isinstance(parsed, dict) else None


def _uncancel() -> None:
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()
