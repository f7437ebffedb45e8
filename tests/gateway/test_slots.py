"""Slots, queue and balancer: pure, so every order of events can be played."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway_app.routing.backends import Backend, Model, Offer
from gateway_app.routing.balancer import choose
from gateway_app.routing.slots import QUEUE_AT_LEAST, Refusal, Slots, Waiter
from gateway_app.upstream.origin import Origin

CHAT = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"


def backend(name: str = "b", slots: int = 1, **fields: Any) -> Backend:
    return Backend(name=name, ident=name, origin=Origin("127.0.0.1", 1), targets={CHAT: b"/"}, headers=(), slots=slots, **fields)


def model(*backends: Backend, name: str = "m", failure: str | None = None) -> Model:
    offers = tuple(Offer(each, name) for each in backends)
    failures = {} if failure is None else {"chat": failure}
    offered = {CHAT: offers} if offers else {}
    return Model(name, 0, frozenset({CHAT}), offered, local=True, parts=("chat",), failures=failures)


def split(chat: Backend | None, embedding: Backend | None, /, *parts: str, **failures: str) -> Model:
    """Chat and embeddings of one model, in processes of their own unless other parts are named."""
    known = {CHAT: chat, EMBEDDINGS: embedding}
    offers = {endpoint: (Offer(each, "m"),) for endpoint, each in known.items() if each is not None}
    return Model("m", 0, frozenset(known), offers, local=True, parts=parts or ("chat", "embedding"), failures=failures)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Queue:
    """Slots with waiters that note what became of them."""

    def __init__(self, *models: Model) -> None:
        self.clock = Clock()
        self.slots = Slots(self.clock)
        self.known = {each.name: each for each in models}
        self.slots.refresh(self.known)
        self.log: list[tuple[str, str]] = []

    def wait(self, who: str, for_model: Model, excluded: Iterable[Backend] = (), endpoint: str = CHAT) -> Waiter:
        self.clock.now += 1
        waiter = Waiter(
            endpoint,
            lambda offer: self.log.append((who, offer.backend.name)),
            lambda why: self.log.append((who, why.name)),
            list(excluded),
            self.clock.now,
        )
        assert self.slots.enqueue(for_model, waiter)
        return waiter

    def refresh(self, *models: Model) -> None:
        self.known = {each.name: each for each in models}
        self.slots.refresh(self.known)


def test_the_least_busy_share_is_chosen_and_equals_take_turns() -> None:
    small, large = backend("small", 2), backend("large", 8)
    chat = model(small, large)
    slots = Slots()
    picks = [offer.backend.name for _ in range(10) if (offer := slots.take(chat, CHAT))]
    assert (small.in_flight, large.in_flight) == (2, 8)
    assert picks[:2] in (["small", "large"], ["large", "small"])
    assert slots.take(chat, CHAT) is None
    for _ in range(3):
        slots.release(large)
    turns = [backend("a", 4), backend("b", 4), backend("c", 4)]
    even = model(*turns)
    order = [offer.backend.name for _ in range(6) if (offer := slots.take(even, CHAT))]
    assert sorted(order[:3]) == ["a", "b", "c"]
    assert order[:3] == order[3:]


def test_weight_draws_traffic_and_closed_doors_none() -> None:
    light, heavy = backend("light", 10), backend("heavy", 10, weight=3.0)
    chat = model(light, heavy)
    slots = Slots()
    for _ in range(8):
        assert slots.take(chat, CHAT)
    assert (light.in_flight, heavy.in_flight) == (2, 6)
    for closed in (backend(suspended=True), backend(retired=True), backend(allowed=False)):
        assert choose([Offer(closed, "m")]) is None
    assert choose([Offer(light, "m")], excluded=[light]) is None


def test_a_freed_slot_wakes_exactly_the_oldest_waiter() -> None:
    only = backend()
    chat = model(only)
    queue = Queue(chat)
    assert queue.slots.take(chat, CHAT)
    for who in ("first", "second", "third"):
        queue.wait(who, chat)
    queue.slots.release(only)
    assert queue.log == [("first", "b")]
    assert only.in_flight == 1
    queue.slots.release(only)
    queue.slots.release(only)
    assert [who for who, _ in queue.log] == ["first", "second", "third"]
    queue.slots.release(only)
    assert (only.in_flight, queue.slots.waiting) == (0, 0)


def test_who_left_the_queue_is_passed_over() -> None:
    only = backend()
    chat = model(only)
    queue = Queue(chat)
    assert queue.slots.take(chat, CHAT)
    first = queue.wait("first", chat)
    queue.wait("second", chat)
    queue.slots.leave(chat, first)
    queue.slots.leave(chat, first)
    assert queue.slots.waiting == 1
    queue.slots.release(only)
    assert queue.log == [("second", "b")]


def test_nobody_gets_a_backend_that_just_failed_him() -> None:
    bad, good = backend("bad"), backend("good")
    chat = model(bad, good)
    queue = Queue(chat)
    assert queue.slots.take(chat, CHAT)
    assert queue.slots.take(chat, CHAT)
    queue.wait("burnt", chat, excluded=[bad])
    queue.wait("fresh", chat)
    queue.slots.release(bad)
    assert queue.log == [("fresh", "bad")]
    queue.slots.release(good)
    assert queue.log == [("fresh", "bad"), ("burnt", "good")]


def test_a_backend_of_two_models_serves_whoever_waits_longest() -> None:
    shared = backend()
    one, two = model(shared, name="one"), model(shared, name="two")
    queue = Queue(one, two)
    assert queue.slots.take(one, CHAT)
    queue.wait("b", two)
    queue.wait("a", one)
    queue.slots.release(shared)
    queue.slots.release(shared)
    assert [who for who, _ in queue.log] == ["b", "a"]


def test_new_ready_and_reopened_backends_wake_as_many_as_they_hold() -> None:
    empty = model()
    queue = Queue(empty)
    for who in ("a", "b", "c"):
        queue.wait(who, empty)
    queue.refresh(model(backend(slots=2)))
    assert [who for who, _ in queue.log] == ["a", "b"]
    closed = backend("late", allowed=False)
    queue.refresh(model(closed))
    assert len(queue.log) == 2
    closed.allowed = True
    queue.slots.reopened(closed)
    assert queue.log[-1] == ("c", "late")


def test_waiters_without_hope_are_sent_away() -> None:
    gone, failed = model(name="gone"), model(name="failed")
    queue = Queue(gone, failed)
    queue.wait("a", gone)
    queue.wait("b", failed)
    queue.refresh(model(name="failed", failure="bad file"))
    assert sorted(queue.log) == [("a", Refusal.MODEL_GONE.name), ("b", Refusal.MODEL_FAILED.name)]
    assert queue.slots.waiting == 0


def test_parts_of_a_model_have_queues_of_their_own() -> None:
    chat, embedding = backend("chat"), backend("embedding")
    both = split(chat, embedding)
    queue = Queue(both)
    assert queue.slots.take(both, CHAT)
    assert queue.slots.take(both, EMBEDDINGS)
    for number in range(QUEUE_AT_LEAST):
        queue.wait(str(number), both)
    assert not queue.slots.enqueue(both, Waiter(CHAT, lambda _: None, lambda _: None))
    queue.wait("embed", both, endpoint=EMBEDDINGS)  # not behind them, and not refused because of them
    assert (queue.slots.queued("m", "chat"), queue.slots.queued("m", "embedding")) == (QUEUE_AT_LEAST, 1)
    assert queue.slots.oldest_wait_s("m", "embedding") < queue.slots.oldest_wait_s("m", "chat")
    queue.slots.release(embedding)
    queue.slots.release(chat)
    assert queue.log == [("embed", "embedding"), ("0", "chat")]


def test_a_part_that_fails_sends_only_its_own_waiters_away() -> None:
    queue = Queue(split(None, None))
    queue.wait("talk", split(None, None))
    queue.wait("embed", split(None, None), endpoint=EMBEDDINGS)
    queue.refresh(split(None, None, chat="bad file"))
    assert queue.log == [("talk", "MODEL_FAILED")]
    queue.refresh(split(None, backend("late"), chat="bad file"))
    assert queue.log[1:] == [("embed", "late")]
    assert queue.slots.waiting == 0


def test_a_part_with_another_server_has_not_failed() -> None:
    elsewhere = backend("elsewhere")
    served = split(elsewhere, None, chat="bad file")
    queue = Queue(served)
    assert queue.slots.take(served, CHAT)
    queue.wait("talk", served)
    queue.refresh(served)
    queue.slots.release(elsewhere)
    assert queue.log == [("talk", "elsewhere")]


def test_waiters_keep_their_place_in_time_when_parts_become_one_process() -> None:
    apart = split(None, None)
    queue = Queue(apart)
    queue.wait("first", apart)
    queue.wait("second", apart, endpoint=EMBEDDINGS)
    leaver = queue.wait("third", apart)
    queue.wait("fourth", apart, endpoint=EMBEDDINGS)
    one = split(None, None, "whole")
    queue.refresh(one)
    assert (queue.slots.queued("m", "whole"), queue.slots.queued("m", "chat"), queue.slots.waiting) == (4, 0, 4)
    queue.slots.leave(one, leaver)
    server = backend("server")
    queue.refresh(split(server, server, "whole"))
    for _ in range(3):
        queue.slots.release(server)
    assert [who for who, _ in queue.log] == ["first", "second", "fourth"]
    assert (queue.slots.waiting, server.in_flight) == (0, 0)


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    only = backend()
    chat = model(only)
    queue = Queue(chat)
    assert queue.slots.take(chat, CHAT)
    for number in range(QUEUE_AT_LEAST):
        queue.wait(str(number), chat)
    assert not queue.slots.enqueue(chat, Waiter(CHAT, lambda _: None, lambda _: None))
    assert queue.slots.retry_after_s("m", "chat") == 1.0
    for _ in range(20):
        queue.clock.now += 0.1
        queue.slots.release(only)
    assert 10 < queue.slots.retry_after_s("m", "chat") < 30  # some 236 waiters at a tenth of a second each
    assert queue.slots.queued("m", "chat") == QUEUE_AT_LEAST - 20
    assert queue.slots.oldest_wait_s("m", "chat") > 0


@given(st.integers(0, 2**32))
def test_whatever_happens_no_slot_is_lost_given_twice_or_left_free(seed: int) -> None:
    chance = random.Random(seed)
    backends = [backend(f"b{number}", chance.randint(1, 3)) for number in range(3)]
    models = [model(*chance.sample(backends, chance.randint(1, 3)), name=f"m{number}") for number in range(3)]
    slots = Slots()
    slots.refresh({each.name: each for each in models})
    holders: list[Backend] = []
    waiting: list[tuple[Model, Waiter]] = []
    for _ in range(200):
        action, chat = chance.random(), chance.choice(models)
        if action < 0.5:
            offer = slots.take(chat, CHAT)
            if offer is not None:
                holders.append(offer.backend)
            else:
                waiter = Waiter(CHAT, lambda granted: holders.append(granted.backend), lambda _: None)
                slots.enqueue(chat, waiter)
                waiting.append((chat, waiter))
        elif action < 0.9 and holders:
            slots.release(holders.pop(chance.randrange(len(holders))))
        elif waiting:
            slots.leave(*waiting.pop(chance.randrange(len(waiting))))
        for each in backends:
            assert each.in_flight == holders.count(each) <= each.slots
        for served in models:
            free = any(offer.backend.has_room for offer in served.offers[CHAT])
            assert not (free and slots.queued(served.name, "chat"))
    while holders:
        slots.release(holders.pop())
    assert not any(each.in_flight for each in backends)
