"""Planning is pure and tried exhaustively; the effects are tried on rows."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from django.conf import settings
from django.utils import timezone
from hypothesis import given, strategies
from hypothesis import settings as hypothesis_settings
from pytest_django.fixtures import Settings

from models_app import launch_spec, lifecycle, operations, reconcile, runtime_folder
from models_app.exceptions import NoNode, StaleTransition
from models_app.models import Cause, DrainReason, Instance, ModelConfig, State
from models_app.models.instance import LIVE, WITH_PROCESS
from models_app.planning import Action, Create, Desired, Drain, Drop, NodeView, Observed, Order, Reset, World, plan
from tests.models.instances import make_instance, make_model, make_node

S = State
NOW = datetime(2026, 1, 1, tzinfo=UTC)
HERE = NodeView(1, "here", heard=True, cordoned=False)
WANT = Desired(model_id=1, part="chat", replicas=1, max_replicas=1, digest="new")


def one(state: State, number: int = 1, digest: str = "new", **changes: object) -> Observed:
    return replace(Observed(number, 1, 1, "chat", "here", state, digest), **changes)  # type: ignore[arg-type]


def planned(*instances: Observed, want: Desired | None = WANT, nodes: tuple[NodeView, ...] = (HERE,)) -> list[Action]:
    return plan(World([want] if want else [], instances, nodes), NOW)


def order(do: str, number: int = 1) -> Order:
    return Order(do, number, 1, "here")  # type: ignore[arg-type]


def test_a_missing_replica_is_created() -> None:
    assert planned() == [Create(1, "chat", 1)]


def test_what_is_as_wanted_rests() -> None:
    assert planned(one(S.READY)) == []


def test_a_pending_instance_is_started() -> None:
    assert planned(one(S.PENDING, digest="")) == [order("start")]


@pytest.mark.parametrize("state", [S.STARTING, S.DRAINING, S.STOPPING])
def test_what_is_on_its_way_is_looked_after(state: State) -> None:
    assert order("advance") in planned(one(state))


@pytest.mark.parametrize(
    ("state", "end"),
    [
        (S.PENDING, Drop(1, 1)),
        (S.FAILED, Drop(1, 1)),
        (S.CRASH_LOOP, Drop(1, 1)),
        (S.READY, Drain(1, 1, "here")),
        (S.STARTING, order("stop")),
    ],
)
@pytest.mark.parametrize("model_id", [1, None])
def test_everything_of_a_disabled_or_deleted_model_ends(state: State, end: Action, model_id: int | None) -> None:
    assert end in planned(one(state, model_id=model_id), want=None)


def test_what_only_makes_room_is_stopped_for_good_once_its_model_is_disabled() -> None:
    assert Drain(1, 1, "here") in planned(one(S.DRAINING, makes_room=True), want=None)
    assert Drain(1, 1, "here") not in planned(one(S.DRAINING, makes_room=True))
    assert Drain(1, 1, "here") not in planned(one(S.DRAINING), want=None)


def test_a_failed_instance_is_tried_again_when_its_time_has_come() -> None:
    later = one(S.FAILED, next_attempt_at=NOW + timedelta(seconds=1))
    assert planned(later) == []
    assert planned(replace(later, next_attempt_at=NOW)) == [order("start")]


def test_a_crash_loop_is_left_alone_until_the_configuration_changes() -> None:
    assert planned(one(S.CRASH_LOOP)) == []
    assert planned(one(S.CRASH_LOOP, digest="old")) == [Reset(1, 1)]


def test_a_failed_instance_is_not_retried_with_the_old_configuration() -> None:
    assert planned(one(S.FAILED, digest="old", next_attempt_at=NOW)) == [Reset(1, 1)]


def surge(state: State, number: int, replaces: int, **changes: object) -> Observed:
    """A replacement on its way."""
    return one(state, number, "" if state == S.PENDING else "new", replaces=replaces, **changes)


def create_for(replaced: int) -> Create:
    return Create(1, "chat", 1, Cause.RESTART, replaced)


def test_a_changed_configuration_starts_another_process_beside_the_old_one() -> None:
    old = one(S.READY, 1, "old")
    assert planned(old) == [create_for(1)]
    assert planned(old, surge(S.PENDING, 2, 1)) == [order("start", 2)]
    assert planned(old, surge(S.STARTING, 2, 1)) == [order("advance", 2)]


def test_the_old_process_goes_once_the_new_one_is_ready() -> None:
    assert planned(one(S.READY, 1, "old"), surge(S.READY, 2, 1)) == [Drain(1, 1, "here")]
    assert planned(one(S.DRAINING, 1, "old"), surge(S.READY, 2, 1)) == [order("advance", 1)]


@pytest.mark.parametrize("state", [S.FAILED, S.CRASH_LOOP])
def test_a_bad_configuration_leaves_the_old_process_serving(state: State) -> None:
    later = NOW + timedelta(minutes=1)
    assert planned(one(S.READY, 1, "old"), surge(state, 2, 1, next_attempt_at=later)) == []


def test_a_failed_replacement_is_tried_again_beside_the_old_one() -> None:
    assert planned(one(S.READY, 1, "old"), surge(S.FAILED, 2, 1, next_attempt_at=NOW)) == [order("start", 2)]


def test_a_configuration_that_is_taken_back_ends_the_replacement() -> None:
    other = replace(surge(S.STARTING, 2, 1), digest="tried")
    assert order("stop", 2) in planned(one(S.READY, 1), other)
    assert planned(one(S.READY, 1), replace(other, state=S.CRASH_LOOP)) == [Drop(2, 1)]
    assert planned(one(S.READY, 1), replace(other, state=S.READY)) == [Drain(2, 1, "here")]


def test_a_configuration_changed_again_starts_the_replacement_anew() -> None:
    old, other = one(S.READY, 1, "old"), replace(surge(S.STARTING, 2, 1), digest="tried")
    assert planned(old, other) == [order("advance", 2), order("stop", 2)]
    assert planned(old, replace(other, state=S.CRASH_LOOP)) == [Reset(2, 1)]


@pytest.mark.parametrize("hold", ["memory", "node_full"])
def test_a_replacement_without_room_beside_the_old_process_takes_its_place(hold: str) -> None:
    waits = surge(S.PENDING, 2, 1, hold=hold)
    assert planned(one(S.READY, 1, "old"), waits) == [Drain(1, 1, "here"), order("start", 2)]
    assert planned(one(S.DRAINING, 1, "old"), waits) == [order("advance", 1)]


def test_with_a_fixed_port_the_old_process_goes_first() -> None:
    want = replace(WANT, may_surge=False)
    old = one(S.READY, 1, "old")
    assert planned(old, want=want) == [create_for(1), Drain(1, 1, "here")]
    assert planned(old, surge(S.PENDING, 2, 1), want=want) == [Drain(1, 1, "here")]
    assert planned(one(S.STOPPING, 1, "old"), surge(S.PENDING, 2, 1), want=want) == [order("advance", 1)]


def test_an_outdated_process_that_still_loads_serves_nobody_and_goes_at_once() -> None:
    old = one(S.STARTING, 1, "old")
    assert planned(old) == [order("advance", 1), create_for(1), order("stop", 1)]
    assert order("stop", 1) in planned(old, surge(S.PENDING, 2, 1))


def test_a_replica_that_waits_for_memory_does_not_hold_up_the_replacement_of_another() -> None:
    want = Desired(1, "chat", 2, 2, "new")
    waits = one(S.PENDING, 2, "", hold="memory")
    assert create_for(1) in planned(one(S.READY, 1, "old"), waits, want=want)


def test_a_replacement_is_placed_where_the_old_process_runs() -> None:
    other = NodeView(4, "other", heard=True, cordoned=False)
    assert planned(one(S.READY, 1, "old"), nodes=(HERE, other)) == [create_for(1)]
    closed = replace(HERE, cordoned=True)
    assert planned(one(S.READY, 1, "old"), nodes=(closed, other)) == [Create(1, "chat", 4, Cause.RESTART, 1)]


def test_replicas_are_replaced_one_at_a_time() -> None:
    want = Desired(1, "chat", 3, 3, "new")
    old = [one(S.READY, number, "old") for number in (1, 2, 3)]
    assert planned(*old, want=want) == [create_for(1)]
    assert planned(*old, surge(S.STARTING, 4, 1), want=want) == [order("advance", 4)]
    assert planned(*old, surge(S.READY, 4, 1), want=want) == [Drain(1, 1, "here")]
    under_way = [one(S.DRAINING, 1, "old"), *old[1:], surge(S.READY, 4, 1)]
    assert planned(*under_way, want=want) == [order("advance", 1)]
    assert planned(*old[1:], surge(S.READY, 4, 1), want=want) == [create_for(2)]


def test_a_bad_configuration_takes_down_one_replica_and_no_more() -> None:
    want = Desired(1, "chat", 2, 2, "new")
    failed = one(S.FAILED, 2, next_attempt_at=NOW + timedelta(minutes=1))
    assert planned(one(S.READY, 1, "old"), failed, want=want) == []
    assert planned(one(S.READY, 1, "old"), one(S.CRASH_LOOP, 2), want=want) == []


def test_a_new_process_waits_until_the_old_one_has_left_its_memory_and_port() -> None:
    assert planned(one(S.STOPPING, 1, "old"), one(S.PENDING, 2, "")) == [order("advance", 1)]


def test_surplus_goes_first_where_it_serves_nobody() -> None:
    ready, failed, pending = one(S.READY, 1), one(S.FAILED, 2), one(S.PENDING, 3, "")
    assert planned(ready, failed, pending) == [Drop(2, 1), Drop(3, 1)]


def test_surplus_that_is_ready_goes_outdated_first_then_newest_first() -> None:
    want = Desired(1, "chat", 1, 3, "new")
    ended = planned(one(S.READY, 1), one(S.READY, 2, "old"), one(S.READY, 3), want=want)
    assert ended == [Drain(2, 1, "here"), Drain(3, 1, "here", DrainReason.EVICT)]


def test_surplus_that_is_ready_goes_idle_first_then_least_recently_used_first() -> None:
    want = Desired(1, "chat", 1, 3, "new")
    busy = one(S.READY, 3, busy=True)
    recent, earlier = one(S.READY, 2, used_at=NOW), one(S.READY, 1, used_at=NOW - timedelta(minutes=1))
    ended = planned(recent, busy, earlier, want=want)
    assert ended == [Drain(1, 1, "here", DrainReason.EVICT), Drain(2, 1, "here", DrainReason.EVICT)]


def test_what_is_more_than_the_maximum_is_stopped_and_not_only_unloaded() -> None:
    want = Desired(1, "chat", 0, 1, "new")
    ended = planned(one(S.READY, 1), one(S.READY, 2), want=want)
    assert ended == [Drain(2, 1, "here"), Drain(1, 1, "here", DrainReason.EVICT)]


def test_new_instances_go_to_the_emptiest_node_that_is_heard_and_not_cordoned() -> None:
    silent = NodeView(2, "silent", heard=False, cordoned=False)
    closed = NodeView(3, "closed", heard=True, cordoned=True)
    other = NodeView(4, "other", heard=True, cordoned=False)
    want = Desired(1, "chat", 3, 3, "new")
    created = planned(one(S.READY), want=want, nodes=(HERE, silent, closed, other))
    assert created == [Create(1, "chat", 4), Create(1, "chat", 1)]


def test_without_a_usable_node_nothing_is_created_and_nothing_is_replaced() -> None:
    silent = replace(HERE, heard=False)
    assert planned(nodes=(silent,)) == []
    assert planned(one(S.READY, digest="old"), nodes=(silent,)) == []


def test_a_silent_node_gets_no_orders_and_its_instances_are_not_given_up() -> None:
    silent = replace(HERE, heard=False)
    for state in (S.PENDING, S.STARTING, S.READY, S.DRAINING):
        assert [action for action in planned(one(state), nodes=(silent,)) if not isinstance(action, Create)] == []
    assert planned(one(S.READY), nodes=(silent,)) == []


def carry_out(world: World, actions: list[Action]) -> World:
    """What the effects and a machine on which every engine starts at once would make of the plan."""
    rows = {row.instance_id: row for row in world.instances}
    for action in actions:
        if isinstance(action, Create):
            number = max([*rows, 1000]) + 1
            new = Observed(number, 0, action.model_id, action.part, "here", S.PENDING, "", replaces=action.replaces)
            rows[number] = new
            continue
        row = rows[action.instance_id]
        if isinstance(action, Reset):
            rows[row.instance_id] = replace(row, state=S.PENDING, digest="")
        elif isinstance(action, Drop):
            del rows[row.instance_id]
        elif isinstance(action, Drain):
            rows[row.instance_id] = replace(row, state=S.DRAINING)
        elif action.do == "start":
            rows[row.instance_id] = replace(row, state=S.STARTING, digest="new", generation=row.generation + 1)
        elif row.state in (S.STARTING, S.STOPPING, S.DRAINING):
            after = S.STOPPING if action.do == "stop" else {S.STARTING: S.READY, S.DRAINING: S.STOPPING}.get(row.state)
            if after is None:
                del rows[row.instance_id]
            else:
                rows[row.instance_id] = replace(row, state=after)
    return replace(world, instances=list(rows.values()))


STATES = strategies.sampled_from([state for state in State if state != S.STOPPED])
ROWS = strategies.lists(strategies.tuples(STATES, strategies.sampled_from(["new", "old"])), max_size=6)


@hypothesis_settings(max_examples=300, deadline=None)
@given(rows=ROWS, replicas=strategies.integers(0, 4), room=strategies.integers(0, 2), may_surge=strategies.booleans())
def test_whatever_is_there_planning_converges_and_never_starts_more_than_allowed(
    rows: list[tuple[State, str]], replicas: int, room: int, may_surge: bool
) -> None:
    want = Desired(1, "chat", replicas, max(1, replicas + room), "new", may_surge=may_surge)
    instances = [one(state, number, digest, next_attempt_at=NOW) for number, (state, digest) in enumerate(rows, 1)]
    world = World([want], instances, [HERE])
    for _ in range(60):
        actions = plan(world, NOW)
        if not actions:
            break
        before = sum(row.state in WITH_PROCESS for row in world.instances)
        serving = sum(row.state == S.READY for row in world.instances)
        world = carry_out(world, actions)
        after = sum(row.state in WITH_PROCESS for row in world.instances)
        assert after <= max(before, want.max_replicas + may_surge)
        # A rolling replacement takes nothing away from those that serve.
        assert not may_surge or sum(row.state == S.READY for row in world.instances) >= min(serving, replicas)
    assert plan(world, NOW) == []
    live = [row for row in world.instances if row.state in LIVE]
    # One that crashed with this very configuration keeps its place, and holds up the replacement of the others.
    crashed = any(row.state == S.CRASH_LOOP for row in live)
    assert len(live) == replicas
    assert crashed or all((row.state, row.digest) == (S.READY, "new") for row in live)


# Effects


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch, valkey: str) -> None:
    from models_app import coordination

    node = make_node()
    coordination.node_beat(node.name, 10_000)


@pytest.mark.django_db
@pytest.mark.usefixtures("heard")
class TestEffects:
    def test_a_saved_model_gets_an_instance_and_an_order_to_start_it_in_one_round(self) -> None:
        make_model()
        orders = reconcile.reconcile()
        instance = Instance.objects.get()
        assert instance.state == S.PENDING
        assert orders == [Order("start", instance.pk, 0, instance.node.name)]

    def test_a_disabled_model_is_drained(self) -> None:
        model = make_model(enabled=False)
        instance = make_instance(S.READY, model, launch_digest=launch_spec.digest(model, "chat"))
        orders = reconcile.reconcile()
        assert Instance.objects.get().state == S.DRAINING
        assert orders == [Order("advance", instance.pk, 0, instance.node.name)]

    def test_a_disabled_model_that_is_making_room_has_no_longer_than_any_other_to_end(self) -> None:
        instance = make_instance(S.READY)
        lifecycle.draining(instance, DrainReason.YIELD)
        assert instance.model is not None
        operations.stop_model(instance.model)
        reconcile.reconcile()
        instance.refresh_from_db()
        assert (instance.state, instance.drain_reason) == (S.DRAINING, DrainReason.STOP)
        assert instance.deadline_at is not None
        assert instance.deadline_at <= timezone.now() + timedelta(seconds=settings.ASSISTANT_ENGINE_DRAIN_S)

    def test_a_deleted_model_is_drained_too(self) -> None:
        make_instance(S.READY)
        ModelConfig.objects.all().delete()
        reconcile.reconcile()
        assert Instance.objects.get().state == S.DRAINING

    def test_what_was_overtaken_is_left_to_the_next_round(self) -> None:
        instance = make_instance(S.READY)
        assert reconcile.apply([Drop(instance.pk, 0), Drop(instance.pk, 7), Create(12345, "chat", 1)]) == []
        assert Instance.objects.get().state == S.READY

    def test_fields_that_the_process_does_not_depend_on_restart_nothing(self) -> None:
        model = make_model()
        before = launch_spec.digest(model, "chat")
        harmless: dict[str, object] = {"priority": 5, "idle_timeout_s": 9, "pinned": True, "max_replicas": 3, "enabled": False}
        for field, value in harmless.items():
            setattr(model, field, value)
        assert launch_spec.digest(model, "chat") == before
        launched_with: dict[str, object] = {"ctx_size": 128, "slots": 7, "extra_args": {"warmup": False}, "engine": "other"}
        for field, value in launched_with.items():
            setattr(model, field, value)
            assert launch_spec.digest(model, "chat") != before
            before = launch_spec.digest(model, "chat")

    def test_between_minimum_and_maximum_the_number_stays(self) -> None:
        model = make_model(min_replicas=0, max_replicas=2)
        assert reconcile.reconcile() == []
        make_instance(S.READY, model, launch_digest=launch_spec.digest(model, "chat"))
        assert reconcile.reconcile() == []
        assert Instance.objects.get().state == S.READY

    def test_a_silent_node_s_instances_stay_until_it_is_fenced_and_are_started_elsewhere_then(self) -> None:
        model = make_model()
        away = make_node("away")
        lost = make_instance(S.READY, model, node=away, launch_digest=launch_spec.digest(model, "chat"))
        for _ in range(3):
            assert reconcile.reconcile() == []
        assert Instance.objects.get().state == S.READY
        lifecycle.fenced(lost, "Node away was fenced by somebody.")
        orders = reconcile.reconcile()
        new = Instance.objects.exclude(pk=lost.pk).get()
        assert (new.state, new.node.name) == (S.PENDING, make_node().name)
        assert orders == [Order("start", new.pk, 0, new.node.name)]

    def test_a_replaced_process_says_what_has_changed(self) -> None:
        model = make_model(ctx_size=8192)
        launched = {**launch_spec.launch_values(model, "chat"), "ctx_size": 4096}
        digest = launch_spec.digest_of(launched)
        old = make_instance(S.READY, model, launch=launched, launch_digest=digest)
        make_instance(S.READY, model, launch_digest=launch_spec.digest(model, "chat"), replaces=old)
        reconcile.reconcile()
        old.refresh_from_db()
        assert (old.state, old.drain_detail) == (S.DRAINING, "Replaced because ctx_size 4096 → 8192.")

    def test_old_ended_instances_go_with_their_folders(self, settings: Settings) -> None:
        settings.ASSISTANT_STOPPED_KEPT = 2
        model = make_model()
        instances = [make_instance(S.STOPPED, model, generation=1) for _ in range(4)]
        running = make_instance(S.READY, model)
        for instance in instances:
            runtime_folder.path(instance.pk, 1).mkdir(parents=True)
        assert reconcile.prune(settings.ASSISTANT_NODE) == 2
        assert set(Instance.objects.values_list("pk", flat=True)) == {instances[2].pk, instances[3].pk, running.pk}
        assert [runtime_folder.path(instance.pk, 1).exists() for instance in instances] == [False, False, True, True]

    def test_starting_a_model_enables_it_and_forgets_its_crashes(self) -> None:
        instance = make_instance(S.CRASH_LOOP, make_model(enabled=False), failures=5)
        assert instance.model is not None
        operations.start_model(instance.model)
        fresh = Instance.objects.get()
        assert (fresh.state, fresh.failures, ModelConfig.objects.get().enabled) == (S.PENDING, 0, True)

    def test_starting_a_model_that_keeps_no_process_gives_it_one(self) -> None:
        model = make_model(min_replicas=0)
        operations.start_model(model)
        operations.start_model(model)
        assert (Instance.objects.get().state, Instance.objects.get().cause) == (S.PENDING, Cause.MANUAL)

    def test_starting_a_model_that_waits_for_room_lets_others_be_unloaded_for_it(self) -> None:
        model = make_model()
        make_instance(model=model, hold="memory")
        operations.start_model(model)
        assert Instance.objects.get().cause == Cause.MANUAL

    def test_stopping_an_instance_that_only_makes_room_stops_it_for_good(self) -> None:
        instance = make_instance(S.READY)
        lifecycle.draining(instance, DrainReason.EVICT)
        operations.stop_instance(instance)
        assert Instance.objects.get().drain_reason == DrainReason.STOP

    def test_stopping_a_model_disables_it(self) -> None:
        model = make_model()
        operations.stop_model(model)
        assert not ModelConfig.objects.get().enabled

    def test_restarting_a_model_replaces_its_processes(self) -> None:
        model = make_model()
        old = make_instance(S.READY, model, launch_digest=launch_spec.digest(model, "chat"))
        operations.restart_model(model)
        reconcile.reconcile()
        assert Instance.objects.get(pk=old.pk).state == S.READY
        new = Instance.objects.exclude(pk=old.pk).get()
        assert (new.state, new.cause, new.replaces_id) == (S.PENDING, Cause.RESTART, old.pk)

    @pytest.mark.parametrize("state", [S.DRAINING, S.STOPPING, S.STOPPED])
    def test_an_instance_that_ends_already_can_be_neither_stopped_nor_restarted(self, state: State) -> None:
        instance = make_instance(state)
        for operation in (operations.stop_instance, operations.restart_instance):
            with pytest.raises(StaleTransition):
                operation(instance)

    @pytest.mark.parametrize(
        ("before", "after"),
        [(S.READY, S.DRAINING), (S.STARTING, S.STOPPING), (S.PENDING, S.STOPPED), (S.CRASH_LOOP, S.STOPPED)],
    )
    def test_an_instance_is_stopped_by_the_way_of_its_state(self, before: State, after: State) -> None:
        operations.stop_instance(make_instance(before))
        assert Instance.objects.get().state == after


@pytest.mark.django_db
@pytest.mark.usefixtures("valkey")
def test_without_a_worker_a_model_that_keeps_no_process_cannot_be_started() -> None:
    make_node("nobody-beats-here")
    with pytest.raises(NoNode, match="is a worker running"):
        operations.start_model(make_model(min_replicas=0))
