"""Keeps the gateway's copy of the database current. The one place of the data plane that touches the ORM, in its own thread.

Once a period, or sooner when hinted, the thread compares the Revision row with what it has read. Everything changed since is
fetched PAGE rows at a time by (revision, id), deletions come as tombstones; the whole is read again at the start, under
another epoch, when the value went backwards, and after an absence so long that tombstones may have been cleared meanwhile.
Updates are built here and taken over on the event loop, which never waits. When the database fails, the last snapshot stays.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from weakref import WeakValueDictionary

from django.db import Error as DatabaseError
from django.db import close_old_connections, connections

from gateway_app import rows as row_reading
from gateway_app.directory import Directory, Rows, assemble
from gateway_app.keys import KeyRecord, KeyTable
from gateway_app.routing.backends import Backend
from models_app.models import Revision

logger = logging.getLogger(__name__)

PERIOD_S = 0.75  # so that a revocation is in force within a second, the check itself included
SPACING_S = 0.02  # between two checks however many hints come
RECHECK_LIMIT_S = 1.0
STALE_AFTER_S = 5.0  # without a finished check, also one that hangs
FULL_RELOAD_AFTER_S = 600.0  # tombstones are kept far longer


@dataclass(frozen=True, slots=True)
class Update:
    """One step to take over. None, or empty: nothing of that kind changed."""

    directory: Directory | None = None
    table: KeyTable | None = None
    keys: tuple[KeyRecord, ...] = ()
    removed_keys: tuple[int, ...] = ()


class Reader:
    """What has been read so far. Used by one thread at a time."""

    def __init__(self, installation_secret: str) -> None:
        self._secret = installation_secret
        self._rows = Rows()
        self._epoch: object = None
        self._value = -1
        self._read_at = 0.0
        # Not strong: a retired backend is kept by its last requests, and found again if its instance returns to READY.
        self._backends: WeakValueDictionary[Hashable, Backend] = WeakValueDictionary()

    def read(self) -> Iterator[Update]:
        """Everything changed since the last call that was read to its end. Raises django.db.Error."""
        close_old_connections()
        now = time.monotonic()
        revision = Revision.objects.filter(id=1).values_list("epoch", "value").first()
        if revision is None:
            raise DatabaseError("The revision counter is missing; run manage.py migrate.")
        epoch, value = revision
        if epoch != self._epoch or value < self._value or now - self._read_at > FULL_RELOAD_AFTER_S:
            yield from self._read_all()
        elif value != self._value:
            yield from self._read_newer(self._value)
        self._epoch, self._value, self._read_at = epoch, value, now

    def forget(self) -> None:
        """Read everything again next time."""
        self._epoch = None

    def _read_all(self) -> Iterator[Update]:
        rows = Rows()
        row_reading.load_all(rows, self._secret)
        table = KeyTable()
        for page in row_reading.all_keys():
            table.apply(page, ())
        self._rows = rows
        yield Update(directory=assemble(rows, self._backends), table=table)

    def _read_newer(self, since: int) -> Iterator[Update]:
        if row_reading.load_newer(self._rows, since, self._secret):
            yield Update(directory=assemble(self._rows, self._backends))
        for page in row_reading.newer_keys(since):
            yield Update(keys=tuple(page))
        removed = row_reading.removed_keys(since)
        if removed:
            yield Update(removed_keys=removed)


class Feed:
    """The thread, and the event loop's side of it. All methods are for the loop."""

    def __init__(self, installation_secret: str, take_over: Callable[[Update], None]) -> None:
        self._reader = Reader(installation_secret)
        self._take_over = take_over
        self._thread = threading.Thread(target=self._run, name="snapshot", daemon=True)
        self._wake = threading.Event()
        self._stopping = False
        self._begun = 0  # checks begun; counted by the thread
        self._waiters: dict[int, asyncio.Future[bool]] = {}
        self._failed = False
        self._read_at: float | None = None

    @property
    def loaded(self) -> bool:
        """Whether there is any snapshot."""
        return self._read_at is not None

    @property
    def stale(self) -> bool:
        """Whether the snapshot may differ from the database for want of an answer."""
        return self._failed or self._read_at is None or time.monotonic() - self._read_at > STALE_AFTER_S

    @property
    def checks(self) -> int:
        """Comparisons begun so far."""
        return self._begun

    async def start(self) -> None:
        """Start the thread and wait for the first snapshot. Raises django.db.Error where the database does not give one."""
        self._loop = asyncio.get_running_loop()
        self._first: asyncio.Future[None] = self._loop.create_future()
        self._thread.start()
        try:
            await asyncio.shield(self._first)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End the thread and close its database connection."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:  # it was started
            await asyncio.to_thread(self._thread.join)

    def hint(self) -> None:
        """Something may have changed: compare now."""
        self._wake.set()

    async def recheck(self) -> bool:
        """Wait for a comparison that began after this call, shared by all who wait, RECHECK_LIMIT_S at most.

        Whether one was made, so that what is not in the snapshot now did not exist when this was called.
        """
        ticket = self._begun + 1  # the next to begin
        waiter = self._waiters.get(ticket)
        if waiter is None:
            waiter = self._waiters[ticket] = self._loop.create_future()
        self._wake.set()
        done, _ = await asyncio.wait([waiter], timeout=RECHECK_LIMIT_S)
        return bool(done) and waiter.result()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                ticket = self._begun = self._begun + 1
                error: Exception | None = None
                try:
                    for update in self._reader.read():
                        self._loop.call_soon_threadsafe(self._take_over, update)
                except DatabaseError as failure:
                    error = failure
                except Exception as failure:  # the thread's boundary: without it nothing would ever be revoked again
                    logger.error("A snapshot could not be made; all of it is read again.", exc_info=failure)
                    self._reader.forget()
                    error = failure
                self._loop.call_soon_threadsafe(self._checked, ticket, error)
                if not self._stopping:
                    time.sleep(SPACING_S)
                    self._wake.wait(PERIOD_S - SPACING_S)
        finally:
            connections.close_all()

    def _checked(self, ticket: int, error: Exception | None) -> None:
        if error is None:
            self._read_at = time.monotonic()
        if self._failed != (error is not None):
            self._failed = error is not None
            if error is not None:
                logger.error("The database does not answer; the last snapshot stays in use: %s", error)
            else:
                logger.info("The database answers again.")
        if not self._first.done():
            if error is None:
                self._first.set_result(None)
            else:
                self._first.set_exception(error)
        for number in [number for number in self._waiters if number <= ticket]:
            self._waiters.pop(number).set_result(error is None)
