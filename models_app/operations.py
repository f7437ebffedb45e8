"""What the buttons do. Rows alone are written here; the caller then asks for a reconcile (models_app/tasks.py)."""

from __future__ import annotations

from django.utils import timezone

from models_app import lifecycle, reconcile
from models_app.exceptions import NoNode, StaleTransition
from models_app.models import Cause, Instance, ModelConfig, Node, State

_GIVEN_UP = (State.FAILED, State.CRASH_LOOP)
_RUNNING = (State.STARTING, State.READY)


def _enable(model: ModelConfig, enabled: bool) -> None:
    ModelConfig.objects.filter(pk=model.pk).update(enabled=enabled, updated_at=timezone.now())
    model.enabled = enabled


def start_model(model: ModelConfig) -> None:
    """Enable it and try failed instances again at once; a model that keeps no process by itself gets one.

    Somebody wants it now, so idle models may be unloaded for it. Raises NoNode where that one could be placed nowhere.
    """
    _enable(model, True)
    live = list(model.instances.live())
    for instance in live:
        if instance.state in _GIVEN_UP:
            lifecycle.reset(instance)
        if instance.state == State.PENDING:
            lifecycle.insisted(instance)
    if not live and model.min_replicas == 0:
        for part in model.parts:
            node_id = reconcile.choose_node()
            if node_id is None:
                raise NoNode(f"No node is ready to start {model.name}; is a worker running?")
            lifecycle.create(model, Node.objects.get(pk=node_id), part, Cause.MANUAL)


def stop_model(model: ModelConfig) -> None:
    """Disable it: its processes drain and end, and none is started."""
    _enable(model, False)


def restart_model(model: ModelConfig) -> None:
    """Replace its processes one at a time; start it where it was stopped."""
    for instance in model.instances.live():
        if instance.state in _RUNNING:
            lifecycle.outdate(instance)
    start_model(model)


def restart_instance(instance: Instance) -> None:
    """Replace this one process, or try it again where it has failed. Raises StaleTransition where it is ending."""
    if instance.state in _GIVEN_UP:
        lifecycle.reset(instance)
    elif instance.state in _RUNNING:
        lifecycle.outdate(instance)
    elif instance.state != State.PENDING:
        raise StaleTransition(f"{instance} is {instance.state} and cannot be restarted.")


def stop_instance(instance: Instance) -> None:
    """End this one process; reconcile starts another where the model wants more. Raises StaleTransition where it is ending."""
    if instance.state == State.READY or instance.makes_room:
        lifecycle.draining(instance)
    elif instance.state == State.STARTING:
        lifecycle.stopping(instance)
    elif instance.state in (State.PENDING, *_GIVEN_UP):
        lifecycle.stopped(instance)
    else:
        raise StaleTransition(f"{instance} is {instance.state} already.")
