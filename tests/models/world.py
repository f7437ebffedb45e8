"""A node in miniature: real rows, real shims and toy engines, and the tasks' work done step by step in one thread.

Emulated: the worker (orders wait in a list until a test has them carried out, or loses them), the gateway
(tests/fakes/spoken_gateway.py), and the passing of time (every moment on record is moved into the past).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
from django.conf import settings
from django.db.models import DateTimeField, DurationField, ExpressionWrapper, F, Value

from models_app import coordination, fit, health, loads, provisioning, reconcile
from models_app.exceptions import StaleTransition
from models_app.models import Instance, ModelConfig, Node, State
from models_app.planning import Order
from models_app.process_identity import send, wait_gone
from tests.fakes.spoken_gateway import SpokenGateway
from tests.fakes.toy_engine import TOY
from tests.models.instances import make_model, make_node

PATIENCE_S = 20.0
MOMENTS = ("state_changed_at", "started_at", "ready_at", "deadline_at", "next_attempt_at", "wanted_since", "last_used_at")
MOVING = (State.STARTING, State.DRAINING, State.STOPPING)


class World:
    """One node with one gateway. Orders that nobody has carried out yet are in `orders`."""

    def __init__(self) -> None:
        self.node: Node = make_node()
        self.gateway = SpokenGateway("gateway-1")
        self.orders: list[Order] = []
        self._foreign = frozenset(psutil.pids())  # there before any engine of this world
        self.hurt: set[int] = set()  # instances on which a test laid hands
        coordination.node_beat(self.node.name, 3_600_000)

    def model(self, name: str, behaviour: str = "serve", **fields: Any) -> ModelConfig:
        return make_model(name, engine="toy", extra_args={"behaviour": behaviour}, **fields)

    def need(self, model: ModelConfig) -> int:
        """Bytes one process of it is expected to need."""
        return fit.claim_of(fit.need_of(model, "chat")).host

    def limit_memory(self, limit: int | None) -> None:
        Node.objects.filter(pk=self.node.pk).update(memory_limit_bytes=limit)

    def pass_time(self, seconds: float) -> None:
        """Everything on record happened so much longer ago, and every deadline is so much nearer."""
        gap = Value(timedelta(seconds=seconds), output_field=DurationField())
        shifted = {name: ExpressionWrapper(F(name) - gap, output_field=DateTimeField()) for name in MOMENTS}
        Instance.objects.update(**shifted)
        self.gateway.pass_time(seconds)

    def reconcile(self) -> None:
        """One round; what processes need is added to the orders. Dead processes are looked for first, as the task does."""
        health.watch(self.node.name)
        self.gateway.look()
        found = reconcile.run_round()
        loads.follow(found.targets)
        self.orders += [order for order in found.orders if order not in self.orders]

    def fetch(self, order: Order) -> Instance | None:
        """The instance this order is for, where it still is for it."""
        states = {"start": (State.PENDING, State.FAILED), "stop": tuple(State), "advance": MOVING}[order.do]
        rows = Instance.objects.filter(pk=order.instance_id, generation=order.generation, state__in=states)
        return rows.select_related("node", "model").first()

    def carry_out(self, order: Order) -> None:
        """As the worker's tasks do: fetch, call the service, put up with having been overtaken."""
        instance = self.fetch(order)
        if instance is None:
            return
        acts: dict[str, Callable[[Instance], object]] = {
            "start": provisioning.provision,
            "stop": provisioning.stop,
            "advance": provisioning.advance,
        }
        try:
            acts[order.do](instance)
        except StaleTransition:
            return

    def round(self) -> None:
        """Reconcile and carry out everything."""
        self.reconcile()
        orders, self.orders = self.orders, []
        for order in orders:
            self.carry_out(order)
        self.gateway.look()

    def until(self, condition: Callable[[], bool], seconds: float = 1.0) -> None:
        """Rounds, each of which takes so many seconds of the passing time, until the condition holds."""
        give_up = time.monotonic() + PATIENCE_S
        while True:
            self.round()
            if condition():
                return
            assert time.monotonic() < give_up, self.describe()
            time.sleep(0.01)
            self.pass_time(seconds)

    def states(self, name: str) -> list[str]:
        """States of a model's instances that have not ended."""
        return sorted(Instance.objects.current().filter(model_name=name).values_list("state", flat=True))

    def one(self, name: str) -> Instance:
        """Its only instance that has not ended."""
        return Instance.objects.current().select_related("node", "model").get(model_name=name)

    def describe(self) -> str:
        rows = Instance.objects.current().order_by("pk")
        return "; ".join(f"{one} {one.state} {one.hold} {one.hold_reason} {one.exit_reason}" for one in rows)

    def kill(self, instance: Instance, which: str = "engine") -> None:
        """kill -9 of its engine or its shim, from outside."""
        process = (provisioning.engine_of if which == "engine" else provisioning.shim_of)(instance)
        if process is not None and send(process, signal.SIGKILL):
            assert wait_gone(process, PATIENCE_S)

    def engines(self) -> list[tuple[int, int]]:
        """(instance, generation) of every engine process that lives now."""
        runs = (_run_of(pid) for pid in psutil.pids() if pid not in self._foreign)
        return [run for run in runs if run is not None]

    def close(self) -> None:
        """End whatever is left, and with it what Valkey knows of it."""
        for stray in provisioning.marked_processes():
            send(stray.process, signal.SIGKILL)
            assert wait_gone(stray.process, PATIENCE_S)
        self.gateway.vanish()
        client = coordination.client()
        for key in client.scan_iter(match="assistant:*"):
            client.delete(key)


def _run_of(pid: int) -> tuple[int, int] | None:
    """The run this process is the engine of, by the runtime folder in its arguments; None where it is none, or a zombie."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
    except OSError:
        return None
    if TOY not in arguments or any(part.endswith(("shim.py", "shim_exec.py")) for part in arguments):
        return None
    folder = Path(arguments[-1])
    return int(folder.parent.name), int(folder.name)


def settings_for(folder: Path, chosen: Any = settings) -> None:
    """Instances and models below this folder, and engines that get half a second to end."""
    chosen.ASSISTANT_INSTANCES_DIR = folder / "instances"
    chosen.ASSISTANT_MODEL_DIRS = [folder]
    chosen.ASSISTANT_ENGINE_TERM_S = 0.5
