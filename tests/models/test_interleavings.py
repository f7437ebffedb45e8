"""Random interleavings of everything that can happen to a node's engines: what must never happen does not, and it comes to rest.

Real rows, real shims and toy engines; the worker, the gateway and the passing of time are emulated (tests/models/world.py). An
interleaving is a burst of steps drawn from its number, on the world the one before left behind; then the world is let come
to rest. A failure names the number and the steps.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pytest_django.fixtures import Settings

from models_app import launch_spec, operations, provisioning
from models_app.engines.base import Command, Launch
from models_app.engines.registry import ENGINES
from models_app.exceptions import StaleTransition
from models_app.models import DrainReason, Instance, ModelConfig, State
from models_app.models.instance import LIVE, WITH_PROCESS
from tests.fakes import gguf_files
from tests.fakes.spoken_gateway import Key
from tests.models.toy import ToyEngine
from tests.models.world import MOVING, World, settings_for

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("valkey")]

SEEDS = 10
INTERLEAVINGS = 20  # of each seed
STEPS = 8


class WorkerLost(Exception):
    """The worker was killed at this very moment."""


class FragileEngine(ToyEngine):
    """The toy; the worker that asks it for a command can be made to die of it, between the claim and the spawn."""

    lethal: ClassVar[bool] = False

    def command(self, launch: Launch) -> Command:
        if FragileEngine.lethal:
            raise WorkerLost
        return super().command(launch)


class Interleaving:
    """Steps that may be taken at any moment, and what must be true after each."""

    def __init__(self, world: World, dice: random.Random) -> None:
        self.world = world
        self.dice = dice
        self.taken: list[str] = []
        self.killed: set[Key] = set()  # by us, from outside
        self.unit = world.need(ModelConfig.objects.earliest("pk"))
        self.steps: list[Callable[[], None]] = [
            self.reconcile, self.reconcile, self.work, self.work, self.work, self.lose_an_order, self.ask, self.ask, self.answer,
            self.hang_up, self.look, self.kill_engine, self.kill_shim, self.change, self.spoil, self.start, self.stop, self.idle,
            self.press, self.lose_the_worker, self.lose_the_record, self.race, self.stop_one, self.wait,
        ]  # fmt: skip

    def take(self, count: int) -> None:
        for _ in range(count):
            step = self.dice.choice(self.steps)
            self.taken.append(step.__name__)
            step()
            self.check()

    # What the platform does

    def reconcile(self) -> None:
        self.world.reconcile()

    def work(self) -> None:
        if self.world.orders:
            self.world.carry_out(self.world.orders.pop(self.dice.randrange(len(self.world.orders))))

    def look(self) -> None:
        self.world.gateway.look()

    # What people and programs do

    def _model(self) -> ModelConfig:
        return self.dice.choice(list(ModelConfig.objects.order_by("pk")))

    def ask(self) -> None:
        self.world.gateway.begin(self._model().name)

    def answer(self) -> None:
        busy = sorted(key for key, count in self.world.gateway.in_flight.items() if count)
        if busy:
            self.world.gateway.end(self.dice.choice(busy))

    def hang_up(self) -> None:
        self.world.gateway.give_up_waiting()

    def start(self) -> None:
        operations.start_model(self._model())

    def stop(self) -> None:
        operations.stop_model(self._model())

    def stop_one(self) -> None:
        if instance := self._instance(State.READY, State.STARTING, State.DRAINING):
            try:
                operations.stop_instance(instance)
            except StaleTransition:
                assert not instance.makes_room

    def change(self) -> None:
        ModelConfig.objects.filter(pk=self._model().pk).update(ctx_size=self.dice.choice((1024, 2048, 4096)))

    def spoil(self) -> None:
        behaviour = self.dice.choice(("serve", "serve", "exit"))
        ModelConfig.objects.filter(pk=self._model().pk).update(extra_args={"behaviour": behaviour})

    def press(self) -> None:
        """The node's memory for engines changes: room for one process, for two, for some, for all."""
        self.world.limit_memory(self.dice.choice((int(self.unit * 1.5), int(self.unit * 2.5), int(self.unit * 4.5), None)))

    # What goes wrong

    def _instance(self, *states: State) -> Instance | None:
        found = list(Instance.objects.filter(state__in=states).select_related("node", "model").order_by("pk"))
        return self.dice.choice(found) if found else None

    def kill_engine(self) -> None:
        if instance := self._instance(*WITH_PROCESS):
            self.world.kill(instance)
            self._gone(instance)

    def kill_shim(self) -> None:
        if instance := self._instance(*WITH_PROCESS):
            self.world.kill(instance, "shim")
            self._gone(instance)

    def _gone(self, instance: Instance) -> None:
        """Its requests are cut off with it."""
        key = (instance.pk, instance.generation)
        self.killed.add(key)
        self.world.hurt.add(instance.pk)
        while self.world.gateway.in_flight[key]:
            self.world.gateway.end(key)

    def lose_an_order(self) -> None:
        if self.world.orders:
            self.world.orders.pop(self.dice.randrange(len(self.world.orders)))

    def lose_the_worker(self) -> None:
        """kill -9 of a worker between its claim and the spawn."""
        if instance := self._about_to_start():
            self.world.hurt.add(instance.pk)
            FragileEngine.lethal = True
            try:
                provisioning.provision(instance)
            except (WorkerLost, StaleTransition):
                return
            finally:
                FragileEngine.lethal = False

    def _about_to_start(self) -> Instance | None:
        """An instance that a worker has just been told to start; a model is started by hand where there is none."""
        for attempt in range(2):
            self.reconcile()
            for order in self.world.orders:
                if order.do == "start" and (found := self.world.fetch(order)) is not None and not found.hold:
                    return found
            if attempt == 0:
                self.start()
        return None

    def lose_the_record(self) -> None:
        """kill -9 of a worker between the spawn and the note of who was spawned."""
        if instance := self._instance(State.STARTING, State.STOPPING):
            nobody = {"pid": None, "start_ticks": None, "boot_id": "", "shim_pid": None, "shim_start_ticks": None}
            Instance.objects.filter(pk=instance.pk).update(**nobody)

    def race(self) -> None:
        """Two workers with the same view of an instance."""
        if instance := self._about_to_start():
            other = Instance.objects.select_related("node", "model").get(pk=instance.pk)
            if provisioning.provision(instance):
                with pytest.raises(StaleTransition):
                    provisioning.provision(other)

    # What time does

    def idle(self) -> None:
        """Longer than the shortest idle time-out, and than any drain for room."""
        self.world.pass_time(45)

    def wait(self) -> None:
        self.world.pass_time(2)

    # What must be true

    def check(self) -> None:
        engines = self.world.engines()
        assert len(engines) == len(set(engines)), f"two processes of one generation: {engines}"
        busy = {key for key, count in self.world.gateway.in_flight.items() if count}
        for pk, generation in busy - self.killed:
            instance = Instance.objects.get(pk=pk)
            assert instance.generation == generation
            if instance.state not in (State.READY, State.DRAINING):
                assert instance.drain_reason == DrainReason.STOP, f"{instance} was ended with requests: {instance.drain_detail}"
        ports = list(Instance.objects.with_process().values_list("port", flat=True))
        assert len(ports) == len(set(ports))

    def rest(self) -> None:
        """Let everybody finish what he is doing; then the world must come to rest, with nothing left over."""
        self.world.gateway.end_all()
        self.world.gateway.give_up_waiting()
        self.taken.append("rest")
        self.world.until(self._rests, seconds=3.0)
        self.world.gateway.ready.clear()
        self.check()
        processes = {(one.pk, one.generation) for one in Instance.objects.with_process()}
        assert set(self.world.engines()) == processes, "orphans"
        self.killed.clear()
        for model in ModelConfig.objects.all():
            self._as_wanted(model)

    def _rests(self) -> bool:
        current = list(Instance.objects.current().select_related("model"))
        if any(one.state in MOVING or (one.state == State.PENDING and not one.hold) for one in current):
            return False
        if any(one.state == State.FAILED and one.diagnosis != "memory" for one in current):
            return False
        live = Counter(one.model_id for one in current if one.state in LIVE)
        there = all(live[model.pk] >= model.min_replicas for model in ModelConfig.objects.enabled())
        return there and not self._to_be_replaced(current)

    def _to_be_replaced(self, current: list[Instance]) -> bool:
        """Something READY is outdated although its replacement has not failed."""
        failing = {one.model_id for one in current if one.state in (State.CRASH_LOOP, State.FAILED)}
        return any(
            one.state == State.READY and one.model and one.launch_digest != launch_spec.digest(one.model, one.part)
            for one in current
            if one.model_id not in failing
        )

    def _as_wanted(self, model: ModelConfig) -> None:
        live = list(model.instances.live())
        if not model.enabled:
            assert live == []
            return
        serving = [one for one in live if one.state == State.READY]
        assert len(serving) <= model.max_replicas
        spoiled = model.extra_args == {"behaviour": "exit"}
        for one in live:
            if one.state == State.CRASH_LOOP:
                assert spoiled or one.pk in self.world.hurt, one.exit_reason
            if one.state == State.PENDING:
                assert one.hold == "memory"

    def release(self) -> None:
        """With room for everybody and nothing spoiled every model has what it wants."""
        self.world.limit_memory(None)
        ModelConfig.objects.update(extra_args={"behaviour": "serve"})
        for model in ModelConfig.objects.all():
            operations.start_model(model)
        self.taken.append("release")
        self.world.until(self._all_serve, seconds=3.0)

    def _all_serve(self) -> bool:
        for model in ModelConfig.objects.all():
            rows = list(model.instances.current())
            digest = launch_spec.digest(model, "chat")
            if not model.min_replicas <= len(rows) <= model.max_replicas:
                return False
            if any((one.state, one.launch_digest) != (State.READY, digest) for one in rows):
                return False
        return True


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, settings: Settings, tmp_path: Path) -> Iterator[World]:
    monkeypatch.setitem(ENGINES, "toy", FragileEngine)
    settings_for(tmp_path, settings)
    settings.ASSISTANT_ENGINE_TRIES = 3
    settings.ASSISTANT_STOPPED_KEPT = 5
    world = World()
    kinds: dict[str, dict[str, Any]] = {
        "kept": {},
        "pair": {"min_replicas": 1, "max_replicas": 2, "priority": 1},
        "asked": {"min_replicas": 0, "idle_timeout_s": 30},
        "pinned": {"min_replicas": 0, "pinned": True, "idle_timeout_s": 60},
    }
    for name, fields in kinds.items():
        gguf_files.llama(tmp_path / f"{name}.gguf")
        world.model(name, chat_model_path=f"{name}.gguf", **fields)
    yield world
    world.close()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_happens_in_whatever_order_it_comes_to_rest_as_wanted(world: World, seed: int) -> None:
    dice = random.Random(seed)
    for number in range(INTERLEAVINGS):
        interleaving = Interleaving(world, dice)
        try:
            interleaving.take(STEPS)
            interleaving.rest()
            if number % 10 == 9:
                interleaving.release()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, number {number}, {' '.join(interleaving.taken)}: {error}") from error
    end_of_the_platform(world)


def end_of_the_platform(world: World) -> None:
    """The platform stops: nothing is left."""
    world.gateway.end_all()
    provisioning.stop_everything(world.node.name, grace_s=5.0)
    assert provisioning.marked_processes() == []
    assert not Instance.objects.filter(state__in=(State.READY, State.STARTING)).exists()
