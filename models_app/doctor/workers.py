"""Who carries out what the control plane orders: nodes, workers and their queues, beat."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from celery import current_app
from django.conf import settings
from kombu import Connection
from kombu.exceptions import KombuError, OperationalError
from redis.exceptions import RedisError

from models_app import coordination, nodes, tasks
from models_app.doctor.finding import Context, Finding, fail, ok, warn
from models_app.models import Instance, Node
from models_app.process_identity import ProcessIdentity, alive

PING_S = 2.0
LONG_QUEUE = 100
BEAT = "beat"  # the lease of the one beat that runs
RESTART = "See logs/worker.log and logs/bulk.log under ASSISTANT_HOME, and start the worker again."


@dataclass(frozen=True, slots=True)
class Seen:
    """One node and how many instances on it have not ended."""

    name: str
    state: nodes.NodeState
    current: int


def check_nodes(context: Context) -> Iterable[Finding]:
    rows = list(Node.objects.all())
    heard = coordination.beating_nodes([node.name for node in rows])
    current = Instance.objects.current()
    seen = [Seen(node.name, nodes.state_of(node, heard), current.filter(node=node).count()) for node in rows]
    yield from judge_nodes(seen, context)


def judge_nodes(seen: Iterable[Seen], context: Context) -> Iterator[Finding]:
    known = False
    for node in seen:
        known = True
        if node.state != nodes.NodeState.UNKNOWN:
            yield ok(f"Node {node.name} is {node.state}.")
        elif not node.current:
            yield warn(f"Node {node.name} has not been heard for 20 s.", "Start its worker, or delete it where it is gone.")
        elif context.running:
            yield fail(
                f"Node {node.name} has not been heard for 20 s; its {node.current} instances wait for it.",
                "Start its worker, or fence the node where it is gone.",
            )
        else:
            yield warn(f"Node {node.name} is not heard, as Assistant is not running here.", "Start it with manage.py up.")
    if not known:
        yield context.absent("No node has ever been heard.", RESTART)


def check_queues(context: Context) -> Iterable[Finding]:
    wanted = ["control", tasks.node_queue(settings.ASSISTANT_NODE), tasks.bulk_queue(settings.ASSISTANT_NODE)]
    try:
        with current_app.connection_for_read() as connection:
            lengths = {name: _length(connection, name) for name in wanted}
            served = _served(connection)
    except (OperationalError, KombuError, RedisError, OSError) as error:
        yield fail(f"The queues cannot be asked ({type(error).__name__}).", "Look at the broker.")
        return
    yield from judge_queues(lengths, served, context)


def _length(connection: Connection, queue: str) -> int:
    """Messages that wait; a queue that does not exist holds none. Asking makes nothing."""
    channel: Any = connection.default_channel  # its stub knows no transport's methods
    try:
        return int(channel.queue_declare(queue=queue, passive=True).message_count)
    except connection.channel_errors:
        return 0


def _served(connection: Connection) -> set[str]:
    """Queues that a live worker takes from, as far as workers answer within PING_S."""
    answers = current_app.control.inspect(timeout=PING_S, connection=connection).active_queues() or {}
    return {queue["name"] for queues in answers.values() for queue in queues}


def judge_queues(lengths: Mapping[str, int], served: Collection[str], context: Context) -> Iterator[Finding]:
    """lengths: of every queue that somebody must take from."""
    for name, length in lengths.items():
        waiting = f"{length} task{'' if length == 1 else 's'} waiting"
        if name not in served:
            yield context.absent(f"No worker takes from the queue {name} ({waiting}).", RESTART)
        elif length > LONG_QUEUE:
            yield warn(f"The queue {name} grows: {waiting}.", "Look at the load, or start another worker for it.")
        else:
            yield ok(f"A worker takes from the queue {name}, {waiting}.")


def check_beat(context: Context) -> Iterable[Finding]:
    yield judge_beat(coordination.holder(BEAT), context)


def judge_beat(token: str | None, context: Context) -> Finding:
    """token: node/boot id/pid/start ticks/noise of the beat that holds the lease, None where none does."""
    if token is None:
        return context.absent("No beat runs, so nothing periodic is done.", "See logs/beat.log under ASSISTANT_HOME.")
    parts = token.split("/")
    if len(parts) != 5 or not (parts[2].isdigit() and parts[3].isdigit()):
        return warn("The lease of beat is held by something unknown.", "Wait 15 s and look again.")
    node, boot, pid, ticks, _ = parts
    if node == settings.ASSISTANT_NODE and not alive(ProcessIdentity(boot, int(pid), int(ticks))):
        return context.absent(f"The lease of beat is that of a dead one (pid {pid}).", "Its successor takes it; else start beat.")
    return ok(f"Beat runs on node {node}, pid {pid}.")
