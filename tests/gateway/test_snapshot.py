"""The gateway's copy of the database: current within a second, by revision, and kept when the database goes."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
from django.db import Error as DatabaseError
from django.db import connection
from django.utils import timezone

from gateway_app import rows
from gateway_app.directory import Directory, Rows, assemble
from gateway_app.keys import KeyTable
from gateway_app.snapshot import Reader
from models_app.contracts import key_material
from models_app.models import APIKey, Instance, ModelAlias, ModelConfig, RemoteServer, Revision, State
from tests.fakes.scripted_upstream import Peer, response
from tests.gateway.conftest import ENGINE_SECRET, SECRET, Cast, Engine, Serve, Served, in_database, until


class Copy:
    """What a gateway would hold after every update so far."""

    def __init__(self) -> None:
        self.reader = Reader(SECRET)
        self.table = KeyTable()
        self.directory = Directory()
        self.full = 0

    def read(self) -> int:
        """Read what is new; how many updates there were."""
        updates = list(self.reader.read())
        for update in updates:
            if update.table is not None:
                self.table, self.full = update.table, self.full + 1
            self.table.apply(update.keys, update.removed_keys)
            self.directory = update.directory or self.directory
        return len(updates)


@contextmanager
def database_down() -> Iterator[None]:
    """Every comparison fails: the counter's table has another name."""
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE models_app_revision RENAME TO away")
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE away RENAME TO models_app_revision")


def test_only_what_changed_is_read_again(cast: Cast, django_assert_num_queries: Callable[[int], object]) -> None:
    copy = Copy()
    model = cast.model()
    text, row = cast.key()
    copy.read()
    assert copy.full == 1
    assert copy.table.find(text) is not None
    assert copy.directory.names["tiny"].offers == {}
    with django_assert_num_queries(1):  # type: ignore[attr-defined]
        assert copy.read() == 0
    row.rpm = 5
    row.save()
    assert copy.read() == 1
    found = copy.table.find(text)
    assert found is not None
    assert found.rpm == 5
    cast.instance(model, 4000)
    copy.read()
    assert [offer.backend.origin.port for offer in copy.directory.names["tiny"].offers["/v1/chat/completions"]] == [4000]
    assert copy.full == 1


def test_deletions_arrive_as_tombstones(cast: Cast) -> None:
    copy = Copy()
    model = cast.model()
    alias = model.aliases.create(name="other")
    remote = cast.remote("http://127.0.0.1:1/v1", {"far": "x"})
    text, row = cast.key()
    copy.read()
    assert set(copy.directory.names) == {"tiny", "other", "far"}
    row.delete()
    alias.delete()
    RemoteServer.objects.filter(pk=remote.pk).delete()
    copy.read()
    assert copy.table.find(text) is None
    assert len(copy.table) == 0
    assert set(copy.directory.names) == {"tiny"}
    ModelConfig.objects.all().delete()
    copy.read()
    assert copy.directory.names == {}
    assert copy.full == 1


def test_another_epoch_or_a_value_that_went_back_reads_everything(cast: Cast) -> None:
    copy = Copy()
    cast.key()
    copy.read()
    Revision.objects.update(epoch=uuid.uuid4())
    copy.read()
    assert copy.full == 2
    Revision.objects.update(value=0)
    copy.read()
    assert copy.full == 3
    assert len(copy.table) == 1


def test_many_keys_come_in_pages(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PAGE", 3)
    copy = Copy()
    texts = [cast.key(f"k{number}")[0] for number in range(7)]
    copy.read()
    assert all(copy.table.find(text) for text in texts)
    APIKey.objects.update(revoked_at=timezone.now())  # one statement: seven rows of (almost) one revision
    assert copy.read() == 3
    assert not any(record.usable for text in texts if (record := copy.table.find(text)))


def test_a_user_switched_off_takes_the_keys_along(cast: Cast) -> None:
    copy = Copy()
    text, row = cast.key()
    copy.read()
    row.user.is_active = False
    row.user.save()
    copy.read()
    found = copy.table.find(text)
    assert found is not None
    assert not found.usable


def test_secrets_are_unsealed_and_an_unreadable_one_spoils_nothing_else(cast: Cast) -> None:
    model = cast.model()
    cast.instance(model, 4000)
    cast.instance(model, 4001, engine_secret="not sealed by us")
    remote = cast.remote("http://host.invalid:1/v1", {"far": "x"})
    RemoteServer.objects.filter(pk=remote.pk).update(address="no url")
    copy = Copy()
    copy.read()
    headers = [dict(backend.headers).get(b"authorization") for backend in copy.directory.backends.values()]
    assert set(headers) == {f"Bearer {ENGINE_SECRET}".encode(), None}
    assert ENGINE_SECRET not in repr(list(copy.directory.backends.values()))


def test_what_an_administrator_got_wrong_in_json_counts_as_nothing(cast: Cast) -> None:
    text, _ = cast.key(scopes="inference", models=["tiny", 7])
    cast.remote("http://127.0.0.1:1/v1", ["far"])  # type: ignore[arg-type]
    copy = Copy()
    copy.read()
    found = copy.table.find(text)
    assert found is not None
    assert found.scopes == frozenset()
    assert found.models == frozenset({"tiny"})


def test_counters_survive_what_does_not_change_the_backend(cast: Cast) -> None:
    copy = Copy()
    model = cast.model(slots=2)
    row = cast.instance(model, 4000)
    copy.read()
    (backend,) = copy.directory.backends.values()
    backend.in_flight = 1
    Instance.objects.update(slots=3)
    copy.read()
    assert list(copy.directory.backends.values()) == [backend]
    assert (backend.in_flight, backend.slots) == (1, 3)
    Instance.objects.update(state=State.DRAINING)
    copy.read()
    assert not copy.directory.backends
    del backend  # nobody else keeps it now, and what it counted is still wanted
    Instance.objects.update(state=State.READY)
    copy.read()
    (backend,) = copy.directory.backends.values()
    assert (backend.in_flight, backend.slots) == (1, 3)
    row.refresh_from_db()
    row.generation = 2
    row.save()
    copy.read()
    (new,) = copy.directory.backends.values()
    assert new is not backend
    assert new.in_flight == 0


def test_a_name_is_a_models_before_it_is_an_aliases(cast: Cast) -> None:
    first, second = cast.model("first"), cast.model("second")
    ModelAlias.objects.create(name="extra", model=first)
    loaded = Rows()
    rows.load_all(loaded, SECRET)
    loaded.aliases[99] = loaded.aliases[next(iter(loaded.aliases))].__class__(99, "second", first.pk)
    directory = assemble(loaded, {})
    assert directory.names["extra"].name == "first"
    assert directory.names["second"].name == second.name


def test_a_model_fails_only_when_all_its_instances_have_given_up(cast: Cast) -> None:
    model = cast.model()
    cast.instance(model, None, State.CRASH_LOOP, exit_reason="bad file")
    other = cast.instance(model, None, State.STARTING)
    copy = Copy()
    copy.read()
    assert copy.directory.names["tiny"].failures == {}
    Instance.objects.filter(pk=other.pk).update(state=State.STOPPED)
    copy.read()
    assert copy.directory.names["tiny"].failures == {"chat": "bad file"}


def test_a_part_that_has_given_up_leaves_the_other_alone(cast: Cast) -> None:
    model = cast.model(engine="wasmedge", embedding_model_path="/models/embed.gguf")
    cast.instance(model, None, State.CRASH_LOOP, part="chat", exit_reason="bad file")
    cast.instance(model, 4000, part="embedding")
    copy = Copy()
    copy.read()
    both = copy.directory.names["tiny"]
    assert both.parts == ("chat", "embedding")
    assert both.failures == {"chat": "bad file"}
    assert set(both.offers) == {"/v1/embeddings"}
    assert (both.ready("chat"), both.ready("embedding"), both.state) == (False, True, "ready")


@pytest.mark.parametrize("diagnosis", ["preflight", "memory"])
def test_a_refused_start_is_a_failure_only_while_nothing_else_may_come(cast: Cast, diagnosis: str) -> None:
    model = cast.model()
    refused = cast.instance(model, None, State.FAILED, pid=None, diagnosis=diagnosis, exit_reason="It needs 9 GiB.")
    copy = Copy()
    copy.read()
    assert copy.directory.names["tiny"].failures == {"chat": "It needs 9 GiB."}
    waiting = cast.instance(model, None, State.PENDING, pid=None)
    copy.read()
    assert copy.directory.names["tiny"].failures == {}
    waiting.delete()
    copy.read()
    assert copy.directory.names["tiny"].failures == {"chat": "It needs 9 GiB."}
    Instance.objects.filter(pk=refused.pk).update(diagnosis="crashed")  # this column alone, and it is noticed
    copy.read()
    assert copy.directory.names["tiny"].failures == {}


def listed(copy: Copy, name: str = "tiny") -> tuple[str, int | None]:
    entry = json.loads(copy.directory.listing[name])
    return entry["state"], entry["context_length"]


def test_the_list_says_what_state_a_model_is_in_and_how_long_its_context(cast: Cast) -> None:
    copy = Copy()
    model = cast.model(ctx_size=1234)
    model.aliases.create(name="other")
    cast.remote("http://127.0.0.1:1/v1", {"far": "x"})
    copy.read()
    assert listed(copy) == listed(copy, "other") == ("idle", 1234)
    assert listed(copy, "far") == ("ready", None)
    row = cast.instance(model, 4000, State.PENDING)
    for state, said in (
        (State.STARTING, "loading"),
        (State.READY, "ready"),
        (State.DRAINING, "idle"),
        (State.FAILED, "loading"),  # its next try will come
        (State.CRASH_LOOP, "failed"),
    ):
        Instance.objects.filter(pk=row.pk).update(state=state)
        copy.read()
        assert listed(copy) == (said, 1234)


def test_a_missing_counter_is_a_database_error(cast: Cast) -> None:
    Revision.objects.all().delete()
    with pytest.raises(DatabaseError, match="migrate"):
        Copy().read()


# --- in a running gateway ----------------------------------------------------------------------------------------------


async def refused(gateway: Served, key: str) -> tuple[int, str | None]:
    reply = await gateway.get("/v1/models", headers=gateway.headers(key))
    return reply.status_code, reply.json().get("error", {}).get("code")


async def test_a_revoked_key_is_refused_within_a_second_without_valkey(serve: Serve) -> None:
    gateway = await serve()
    assert (await gateway.get("/v1/models")).status_code == 200
    began = time.monotonic()
    await in_database(lambda: APIKey.objects.update(revoked_at=timezone.now()))
    while (await refused(gateway, gateway.key))[0] == 200:
        assert time.monotonic() < began + 5  # the promise is one second; a busy machine gets more
    assert await refused(gateway, gateway.key) == (401, "invalid_api_key")


async def test_a_new_key_works_at_once_and_an_unknown_one_is_told_so(cast: Cast, serve: Serve) -> None:
    gateway = await serve()
    text, _ = await in_database(lambda: cast.key("new"))
    assert (await gateway.get("/v1/models", headers=gateway.headers(text))).status_code == 200
    assert await refused(gateway, key_material.generate().text) == (401, "invalid_api_key")


async def test_many_unknown_keys_share_one_look_at_the_database(serve: Serve) -> None:
    gateway = await serve()
    before = gateway.gateway.feed.checks
    strangers = [key_material.generate().text for _ in range(40)]
    answers = await asyncio.gather(*(refused(gateway, text) for text in strangers))
    assert set(answers) == {(401, "invalid_api_key")}
    assert gateway.gateway.feed.checks - before < 20


async def test_a_key_expires_by_the_clock_at_use(cast: Cast, serve: Serve) -> None:
    gateway = await serve()
    soon = timezone.now() + timedelta(seconds=0.4)
    text, _ = await in_database(lambda: cast.key("brief", expires_at=soon))
    reads = gateway.gateway.keys
    assert (await gateway.get("/v1/models", headers=gateway.headers(text))).status_code == 200
    record = reads.table.find(text)
    assert record is not None
    await until(lambda: not record.valid(time.time()))
    assert await refused(gateway, text) == (401, "invalid_api_key")


async def test_with_the_database_down_known_keys_go_on_and_unknown_ones_are_no_401(
    cast: Cast, serve: Serve, engine: Engine
) -> None:
    async def good(peer: Peer) -> None:
        await peer.read_request()
        peer.write(response(b'{"choices": []}'))

    upstream = await engine(good)
    await in_database(lambda: cast.instance(cast.model(), upstream.port))
    dead, _ = await in_database(lambda: cast.key("dead", revoked_at=timezone.now()))
    gateway = await serve()
    down = database_down()
    await in_database(down.__enter__)
    try:
        assert await refused(gateway, key_material.generate().text) == (503, "auth_backend_unavailable")
        assert (await gateway.chat()).status_code == 200
        assert await refused(gateway, dead) == (401, "invalid_api_key")
        assert await refused(gateway, "noise") == (401, "invalid_api_key")
        readiness = await gateway.get("/readyz")
        assert readiness.status_code == 503
        assert readiness.json()["checks"]["database"] is False
    finally:
        await in_database(lambda: down.__exit__(None, None, None))
    await gateway.gateway.feed.recheck()
    assert await refused(gateway, key_material.generate().text) == (401, "invalid_api_key")


async def test_a_gateway_without_a_first_snapshot_does_not_start(serve: Serve) -> None:
    await in_database(lambda: Revision.objects.all().delete())
    with pytest.raises(DatabaseError):
        await serve()


@pytest.mark.skipif(connection.vendor != "sqlite", reason="only SQLite stores a date that is none")
async def test_a_row_that_cannot_be_read_stops_nothing_for_good(cast: Cast, serve: Serve) -> None:
    gateway = await serve()
    _, broken = await in_database(lambda: cast.key("broken"))
    await in_database(lambda: _write_date(broken.pk, "2026-99-99 00:00:00"))
    assert await refused(gateway, key_material.generate().text) == (503, "auth_backend_unavailable")
    assert (await gateway.get("/v1/models")).status_code == 200
    await in_database(lambda: _write_date(broken.pk, None))
    text, _ = await in_database(lambda: cast.key("later"))
    assert (await gateway.get("/v1/models", headers=gateway.headers(text))).status_code == 200


def _write_date(key: int, value: str | None) -> None:
    with connection.cursor() as cursor:
        cursor.execute("UPDATE models_app_apikey SET expires_at = %s WHERE id = %s", [value, key])
