"""The upstream client against real sockets: pooling, retry, cancellation, time limits, TLS; on both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gateway_app.upstream.http import (
    BodyTooLarge,
    ConnectFailed,
    Origin,
    UpstreamBroken,
    UpstreamPool,
    UpstreamResponse,
    UpstreamTimeout,
)
from tests.fakes.scripted_upstream import Peer, Script, ScriptedUpstream, chunk, completion_events, head, response, stream_head

OK = response(b'{"ok": true}')


@pytest.fixture
async def pool() -> AsyncIterator[UpstreamPool]:
    made = UpstreamPool(connect_timeout_s=5)
    yield made
    await made.close()


def origin_of(upstream: ScriptedUpstream) -> Origin:
    return Origin(upstream.host, upstream.port)


async def post(pool: UpstreamPool, upstream: ScriptedUpstream, body: bytes = b"{}") -> UpstreamResponse:
    return await pool.send(origin_of(upstream), b"POST", b"/v1/x", [(b"content-type", b"application/json")], body)


async def answered(pool: UpstreamPool, upstream: ScriptedUpstream) -> bytes:
    return await (await post(pool, upstream)).read(10_000)


async def ok(peer: Peer) -> None:
    await peer.read_request()
    peer.write(OK)


async def silent(peer: Peer) -> None:
    await peer.read_request()
    await peer.wait_closed()


async def endless(peer: Peer) -> None:
    await peer.read_request()
    peer.write(stream_head() + chunk(b"data: 1\n\n"))
    await peer.wait_closed()


def first_then(first: Script, second: Script) -> Script:
    """The first request is handled by one script, all others by another."""
    seen = 0

    async def script(peer: Peer) -> None:
        nonlocal seen
        seen += 1
        await (first if seen == 1 else second)(peer)

    return script


async def hang_up(peer: Peer) -> None:
    await peer.read_request()
    peer.close()


async def answer_in_plain(peer: Peer) -> None:
    peer.write(OK)
    await peer.wait_closed()


# --- pooling -----------------------------------------------------------------------------------------------------------


async def test_a_request_arrives_as_sent_and_its_answer_comes_back(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(ok) as upstream:
        reply = await post(pool, upstream, b"body")
        assert (reply.status, reply.header(b"content-type"), reply.header(b"none")) == (200, b"application/json", None)
        assert await reply.read(100) == b'{"ok": true}'
        request = upstream.requests[0]
        assert (request.method, request.target, request.body) == ("POST", "/v1/x", b"body")
        assert request.header("host") == f"127.0.0.1:{upstream.port}"


async def test_requests_after_one_another_share_one_connection(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(ok) as upstream:
        for _ in range(3):
            assert await answered(pool, upstream) == b'{"ok": true}'
            assert (pool.open_connections, pool.idle_connections) == (1, 1)
        assert upstream.connections == 1


async def test_the_connection_used_last_is_taken_first(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(ok) as upstream:
        first, second = await post(pool, upstream), await post(pool, upstream)
        await second.read(100)
        await first.read(100)
        await answered(pool, upstream)
        assert [request.connection for request in upstream.requests] == [0, 1, 0]


async def test_no_more_than_the_cap_is_kept() -> None:
    pool = UpstreamPool(max_idle=2)
    async with ScriptedUpstream(ok) as upstream:
        for reply in [await post(pool, upstream) for _ in range(5)]:
            await reply.read(100)
        assert pool.idle_connections == 2
        await upstream.until(lambda: upstream.open_connections == 2)
        await pool.close()


async def test_origins_do_not_share_connections(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(ok) as one, ScriptedUpstream(ok) as two:
        for upstream in (one, two, one, two):
            await answered(pool, upstream)
        assert (one.connections, two.connections, pool.idle_connections) == (1, 1, 2)


async def test_an_event_stream_read_to_its_end_is_never_pooled(pool: UpstreamPool) -> None:
    async def script(peer: Peer) -> None:
        await peer.read_request()
        peer.write(stream_head() + b"".join(chunk(event) for event in completion_events(["a", "b"])) + chunk(b""))

    async with ScriptedUpstream(script) as upstream:
        reply = await post(pool, upstream)
        async with aclosing(reply.chunks()) as chunks:
            received = [data async for data in chunks]
        assert b"".join(received) == b"".join(completion_events(["a", "b"]))
        assert pool.idle_connections == 0
        await upstream.until(lambda: upstream.open_connections == 0)


@pytest.mark.parametrize(
    "close", [b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi", b"HTTP/1.1 200 OK\r\n\r\nhi"]
)
async def test_an_answer_that_ends_its_connection_is_read_whole_and_not_pooled(pool: UpstreamPool, close: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.read_request()
        peer.write(close)
        peer.close()

    async with ScriptedUpstream(script) as upstream:
        assert [await answered(pool, upstream), await answered(pool, upstream)] == [b"hi", b"hi"]
        assert upstream.connections == 2


async def test_an_idle_connection_is_closed_when_its_time_is_over() -> None:
    pool = UpstreamPool(idle_s=0.05)
    async with ScriptedUpstream(ok) as upstream:
        for reply in [await post(pool, upstream) for _ in range(3)]:
            await reply.read(100)
        assert pool.idle_connections == 3
        await upstream.until(lambda: upstream.open_connections == 0)
        assert (pool.idle_connections, await answered(pool, upstream)) == (0, b'{"ok": true}')
        await pool.close()


async def test_an_idle_connection_that_the_upstream_closes_leaves_the_pool(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(ok) as upstream:
        await answered(pool, upstream)
    while pool.open_connections:
        await asyncio.sleep(0)
    assert pool.idle_connections == 0


async def test_released_before_its_end_a_connection_is_closed(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(endless) as upstream:
        reply = await post(pool, upstream)
        reply.release()
        reply.release()
        reply.abort()
        await upstream.until(lambda: upstream.open_connections == 0)
        with pytest.raises(UpstreamBroken, match="released"):
            await reply.read(100)


async def test_released_unread_but_whole_a_connection_serves_again(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(ok) as upstream:
        reply = await post(pool, upstream)
        reply.release()
        reply.abort()  # too late to count
        assert await answered(pool, upstream) == b'{"ok": true}'
        assert upstream.connections == 1


async def test_aborted_a_connection_is_closed_at_once(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(endless) as upstream:
        reply = await post(pool, upstream)
        reply.abort()
        await upstream.until(lambda: upstream.open_connections == 0)
        assert pool.idle_connections == 0


# --- stale connections -------------------------------------------------------------------------------------------------


async def test_a_stale_pooled_connection_is_replaced_once_without_a_word(pool: UpstreamPool) -> None:
    async def script(peer: Peer) -> None:
        await peer.read_request()
        if peer.reads == 2:
            peer.close()  # as an engine does whose keep-alive time was over
        else:
            peer.write(OK)

    async with ScriptedUpstream(script) as upstream:
        assert [await answered(pool, upstream) for _ in range(2)] == [b'{"ok": true}'] * 2
        assert [request.connection for request in upstream.requests] == [0, 0, 1]


async def test_a_fresh_connection_that_is_closed_without_an_answer_is_not_tried_again(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(hang_up) as upstream:
        with pytest.raises(UpstreamBroken):
            await post(pool, upstream)
        assert upstream.connections == 1


async def test_a_stale_connection_is_replaced_only_once(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(first_then(ok, hang_up)) as upstream:
        await answered(pool, upstream)
        with pytest.raises(UpstreamBroken):
            await post(pool, upstream)
        assert upstream.connections == 2


async def test_a_pooled_connection_that_broke_within_an_answer_is_not_tried_again(pool: UpstreamPool) -> None:
    async def half(peer: Peer) -> None:
        await peer.read_request()
        peer.write(b"HTTP/1.1 2")
        peer.close()

    async with ScriptedUpstream(first_then(ok, half)) as upstream:
        await answered(pool, upstream)
        with pytest.raises(UpstreamBroken):
            await post(pool, upstream)
        assert upstream.connections == 1


async def test_an_upstream_that_dies_on_a_pooled_connection_is_broken_not_unreached(pool: UpstreamPool) -> None:
    async def die(peer: Peer) -> None:
        await peer.read_request()
        upstream.stop_listening()
        peer.abort()

    async with ScriptedUpstream(first_then(ok, die)) as upstream:
        await answered(pool, upstream)
        with pytest.raises(UpstreamBroken, match="went away"):
            await post(pool, upstream)


# --- failures ----------------------------------------------------------------------------------------------------------


async def test_a_refused_connection_is_told_as_such(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(ok) as upstream:
        origin = origin_of(upstream)
    with pytest.raises(ConnectFailed, match="cannot connect"):
        await pool.send(origin, b"GET", b"/", [], b"")
    assert pool.open_connections == 0


async def test_a_name_that_cannot_be_looked_up_is_a_failed_connection(pool: UpstreamPool) -> None:
    with pytest.raises(ConnectFailed):
        await pool.send(Origin("x" * 64 + ".example", 80), b"GET", b"/", [], b"")


@contextlib.contextmanager
def full_backlog() -> Iterator[int]:
    """A port whose connections are never accepted: its queue is full."""
    with socket.socket() as server, contextlib.ExitStack() as waiting:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield server.getsockname()[1]


async def test_a_connection_that_does_not_come_about_in_time_is_given_up() -> None:
    pool = UpstreamPool(connect_timeout_s=0.1)
    with full_backlog() as port, pytest.raises(ConnectFailed, match="in time"):
        await pool.send(Origin("127.0.0.1", port), b"GET", b"/", [], b"")
    assert pool.open_connections == 0


async def test_cancelled_while_connecting_nothing_is_left(pool: UpstreamPool) -> None:
    with full_backlog() as port:
        sending = asyncio.ensure_future(pool.send(Origin("127.0.0.1", port), b"GET", b"/", [], b""))
        await asyncio.sleep(0.01)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
    assert pool.open_connections == 0


async def test_a_request_that_cannot_be_written_is_refused_before_anything_is_sent(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(ok) as upstream:
        with pytest.raises(ValueError, match="line break"):
            await pool.send(origin_of(upstream), b"GET", b"/", [(b"a", b"b\r\nc: d")], b"")
        assert upstream.connections == 0


async def test_a_stream_that_breaks_off_gives_what_came_and_then_fails(pool: UpstreamPool) -> None:
    async def script(peer: Peer) -> None:
        await peer.read_request()
        peer.write(stream_head() + chunk(b"data: 1\n\n"))
        await peer.drain()
        peer.close()

    async with ScriptedUpstream(script) as upstream:
        reply = await post(pool, upstream)
        received = []
        with pytest.raises(UpstreamBroken):  # noqa: PT012 - what came before counts too
            async for data in reply.chunks():
                received.append(data)  # noqa: PERF401 - it fails midway
        assert received == [b"data: 1\n\n"]
        assert pool.idle_connections == 0


async def test_without_an_answer_in_the_time_given_the_connection_is_closed(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(first_then(ok, silent)) as upstream:
        await answered(pool, upstream)
        with pytest.raises(UpstreamTimeout):
            await pool.send(origin_of(upstream), b"POST", b"/", [], b"", first_byte_timeout_s=0.05)
        await upstream.until(lambda: upstream.open_connections == 0)
        assert upstream.connections == 1  # a slow upstream is not asked twice


async def test_an_answer_within_the_time_given_is_an_answer(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(ok) as upstream:
        reply = await pool.send(origin_of(upstream), b"POST", b"/", [], b"", first_byte_timeout_s=30)
        assert await reply.read(100) == b'{"ok": true}'


# --- cancellation ------------------------------------------------------------------------------------------------------


async def test_cancelled_before_the_answer_the_connection_is_closed(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(silent) as upstream:
        sending = asyncio.ensure_future(post(pool, upstream))
        await upstream.until(lambda: len(upstream.requests) == 1)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        await upstream.until(lambda: upstream.open_connections == 0)
        assert pool.idle_connections == 0


@pytest.mark.parametrize("way", ["read", "chunks"])
async def test_cancelled_within_a_body_the_connection_is_closed(pool: UpstreamPool, way: str) -> None:
    async def consume(reply: UpstreamResponse) -> None:
        if way == "read":
            await reply.read(1000)
        async for _ in reply.chunks():
            pass

    async with ScriptedUpstream(endless) as upstream:
        reading = asyncio.ensure_future(consume(await post(pool, upstream)))
        await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await upstream.until(lambda: upstream.open_connections == 0)


async def test_a_reader_that_stops_early_closes_the_connection(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(endless) as upstream:
        reply = await post(pool, upstream)
        async with aclosing(reply.chunks()) as chunks:
            async for data in chunks:
                assert data == b"data: 1\n\n"
                break
        await upstream.until(lambda: upstream.open_connections == 0)


async def test_a_reader_that_stops_early_closes_the_connection_even_if_all_has_come(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(ok) as upstream:
        reply = await post(pool, upstream)
        async with aclosing(reply.chunks()) as chunks:
            assert await anext(chunks) == b'{"ok": true}'
        assert pool.idle_connections == 0


async def test_closing_the_pool_ends_every_connection_and_tells_who_waits(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(first_then(ok, silent)) as upstream:
        await answered(pool, upstream)
        busy = [asyncio.ensure_future(post(pool, upstream)) for _ in range(2)]
        await upstream.until(lambda: len(upstream.requests) == 3)
        await pool.close()
        assert pool.open_connections == 0
        for sending in busy:
            with pytest.raises(UpstreamBroken):
                await sending
        with pytest.raises(ConnectFailed, match="stopping"):
            await post(pool, upstream)
        await pool.close()


async def test_a_connection_that_comes_about_after_the_pool_was_closed_is_closed(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(silent) as upstream:
        sending = asyncio.ensure_future(post(pool, upstream))
        await asyncio.sleep(0)
        await pool.close()
        with pytest.raises(ConnectFailed):
            await sending
        await upstream.until(lambda: upstream.open_connections == 0)
        assert (pool.open_connections, upstream.requests) == (0, [])


async def test_hundreds_of_requests_at_once_some_cancelled_leave_nothing_behind(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(ok) as upstream:
        calls = [asyncio.ensure_future(answered(pool, upstream)) for _ in range(300)]
        for number, call in enumerate(calls):
            if number % 3 == 0:
                await asyncio.sleep(0)
                call.cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {result for result in results if not isinstance(result, asyncio.CancelledError)} == {b'{"ok": true}'}
        await upstream.until(lambda: upstream.open_connections == pool.idle_connections)
        assert pool.idle_connections <= 64


# --- bodies ------------------------------------------------------------------------------------------------------------


async def test_large_bodies_pass_whole_in_both_directions(pool: UpstreamPool) -> None:
    sent = bytes(range(256)) * 20_000

    async def script(peer: Peer) -> None:
        request = await peer.read_request()
        peer.write(head(200, [("Transfer-Encoding", "chunked")]))
        for start in range(0, len(request.body), 100_000):
            peer.write(chunk(request.body[start : start + 100_000]))
            await peer.drain()
        peer.write(chunk(b""))

    async with ScriptedUpstream(script) as upstream:
        reply = await post(pool, upstream, sent)
        assert await reply.read(len(sent)) == sent
        assert pool.idle_connections == 1


async def test_a_body_past_the_readers_limit_is_refused_and_the_connection_closed(pool: UpstreamPool) -> None:
    async def script(peer: Peer) -> None:
        await peer.read_request()
        peer.write(response(b"x" * 1001))

    async with ScriptedUpstream(script) as upstream:
        assert len(await (await post(pool, upstream)).read(1001)) == 1001
        with pytest.raises(BodyTooLarge, match="1000 bytes"):
            await (await post(pool, upstream)).read(1000)
        await upstream.until(lambda: upstream.open_connections == 0)


async def test_an_answer_to_a_request_still_being_sent_is_read_and_the_connection_not_pooled(pool: UpstreamPool) -> None:
    async def refuse(peer: Peer) -> None:
        peer.write(response(b"too large", 413))
        await gate.wait()
        peer.abort()

    gate = asyncio.Event()
    async with ScriptedUpstream(refuse) as upstream:
        reply = await post(pool, upstream, b"x" * 30_000_000)
        assert (reply.status, await reply.read(100)) == (413, b"too large")
        assert pool.idle_connections == 0
        gate.set()


# --- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate that signs itself, for 127.0.0.1 and good.test, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("good.test")]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


def serving(certificate: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context


@pytest.mark.parametrize(
    ("hostname", "trusted", "works"),
    [(None, True, True), ("good.test", True, True), ("bad.test", True, False), (None, False, False)],
)
async def test_an_https_upstream_must_prove_its_name(certificate: Path, hostname: str | None, trusted: bool, works: bool) -> None:
    pool = UpstreamPool(tls=ssl.create_default_context(cafile=certificate) if trusted else None)
    async with ScriptedUpstream(ok, tls=serving(certificate)) as upstream:
        origin = Origin(upstream.host, upstream.port, tls=True, server_hostname=hostname)
        for _ in range(2):
            if works:
                reply = await pool.send(origin, b"POST", b"/", [], b"{}")
                assert await reply.read(100) == b'{"ok": true}'
            else:
                with pytest.raises(ConnectFailed, match="certificate"):
                    await pool.send(origin, b"POST", b"/", [], b"{}")
        assert pool.open_connections == (1 if works else 0)
        await pool.close()


async def test_an_upstream_that_speaks_no_tls_is_a_failed_connection(pool: UpstreamPool) -> None:
    async with ScriptedUpstream(hang_up, on_connect=answer_in_plain) as upstream:
        with pytest.raises(ConnectFailed):
            await pool.send(Origin(upstream.host, upstream.port, tls=True), b"GET", b"/", [], b"")
    assert pool.open_connections == 0
