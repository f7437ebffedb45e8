"""Start one engine process of this node: checked, admitted, claimed, spawned. Short: nothing here waits for an engine to load."""

from __future__ import annotations

import logging
import secrets
from datetime import timedelta

from django.conf import settings
from django.db import IntegrityError, transaction
from django.utils import timezone

from models_app import admitting, diagnosis, engine_access, launch_spec, lifecycle, ports, runtime_folder
from models_app.contracts import secret_box
from models_app.contracts.diagnoses import Code
from models_app.engine_process import folder_of
from models_app.engines.base import EngineAdapter, Launch, ModelSpec
from models_app.exceptions import PreflightError, SpawnError
from models_app.models import Instance, ModelConfig

log = logging.getLogger(__name__)

PORT_TRIES = 3


def provision(instance: Instance) -> bool:
    """PENDING or FAILED → STARTING with a spawned process, FAILED with the reason, or PENDING that waits for room.

    True where a process was started. Raises StaleTransition where somebody else was faster.
    """
    config = instance.model
    if config is None or not config.enabled:
        return False
    digest = launch_spec.digest(config, instance.part)
    try:
        adapter = engine_access.adapter(config.engine)
        spec = launch_spec.model_spec(config, instance.part)
        adapter.preflight(spec)
        launch = _admit(instance, config, spec, digest)
    except PreflightError as error:
        log.warning("%s cannot start: %s", instance, error)
        lifecycle.refused(instance, str(error), digest, error.diagnosis)
        return False
    return launch is not None and _spawn(instance, adapter, launch)


def _admit(instance: Instance, config: ModelConfig, spec: ModelSpec, digest: str) -> Launch | None:
    """Take memory, a port and the next generation, while nobody else on this node does; None where it has to wait."""
    with admitting.alone() as alone:
        if not alone:
            return None
        answer = admitting.ask(instance, config, spec)
        if answer.never:
            log.warning("%s does not fit: %s", instance, answer.sentence)
            lifecycle.refused(instance, answer.sentence, digest, Code.MEMORY)
            return None
        if answer.hold:
            admitting.hold_back(instance, answer)
            return None
        return _claim(instance, config, spec, answer.needs_bytes)


def _claim(instance: Instance, config: ModelConfig, spec: ModelSpec, memory_bytes: int | None) -> Launch:
    """Take a port and the next generation. A port that another process got between look and claim is chosen anew."""
    secret = secrets.token_urlsafe(32)
    deadline_at = timezone.now() + timedelta(seconds=launch_spec.load_deadline_s(spec))
    values = launch_spec.launch_values(config, instance.part)
    for _ in range(PORT_TRIES):
        claim = lifecycle.Claim(
            port=ports.choose(config.port, _taken_ports(instance), settings.ASSISTANT_ENGINE_PORTS),
            sealed_secret=secret_box.seal(settings.SECRET_KEY, secret),
            digest=launch_spec.digest_of(values),
            launch=values,
            model_name=config.name,
            engine=config.engine,
            slots=spec.slots,
            ctx_size=spec.ctx_size,
            deadline_at=deadline_at,
            memory_bytes=memory_bytes,
        )
        try:
            with transaction.atomic():
                lifecycle.starting(instance, claim)
        except IntegrityError:
            continue
        return Launch(spec, instance.pk, instance.generation, claim.port, secret, folder_of(instance))
    raise PreflightError("Ports are being taken as fast as they are chosen; this is tried again.")


def _taken_ports(instance: Instance) -> set[int]:
    """Ports of this node's other processes; and its own last one where somebody else turned out to be on it."""
    busy = Instance.objects.with_process().filter(node=instance.node)
    taken = {port for port in busy.values_list("port", flat=True) if port is not None}
    fixed = instance.model is not None and instance.model.port is not None
    if instance.port is not None and instance.diagnosis in (Code.PORT_TAKEN, Code.WRONG_SERVER) and not fixed:
        taken.add(instance.port)
    return taken


def _spawn(instance: Instance, adapter: EngineAdapter, launch: Launch) -> bool:
    try:
        command = adapter.command(launch)
        runtime_folder.prepare(launch.folder, command)
        pair = runtime_folder.spawn(launch.folder, launch.instance_id, launch.generation, command.env)
    except (OSError, SpawnError, PreflightError) as error:
        lifecycle.failed(instance, diagnosis.not_started(f"The engine could not be started: {error}"))
        return False
    if pair is not None:  # else the next look finds it
        lifecycle.spawned(instance, pair.engine, pair.shim)
        log.info("%s generation %d: engine pid %d on port %d", instance, launch.generation, pair.engine.pid, launch.port)
    return True
