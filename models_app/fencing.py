"""Taking nodes out of use: cordoned for a while, fenced when they are gone, deleted when they will not come back.

A node's silence alone proves nothing, so its instances wait until somebody says it is gone.
"""

from __future__ import annotations

import logging

from django.db import transaction

from models_app import coordination, lifecycle
from models_app.exceptions import NodeInUse, StaleTransition
from models_app.models import Instance, Node, State

log = logging.getLogger(__name__)


def cordon_node(node: Node, cordoned: bool) -> None:
    """Keep new instances off a node, or let them be placed there again."""
    Node.objects.filter(pk=node.pk).update(cordoned=cordoned)
    node.cordoned = cordoned


def fence_node(node: Node, by: str) -> int:
    """Mark every instance of a silent node STOPPED, so that reconcile starts them elsewhere; how many there were.

    What still runs there is a stray from then on, which the node ends first thing when it comes back. Raises NodeInUse where
    it is heard, CoordinationUnavailable where nobody can tell.
    """
    if coordination.beating_nodes([node.name]):
        raise NodeInUse(f"Node {node.name} is heard, so it is not gone; cordon it and stop its instances instead.")
    fenced = 0
    for instance in list(Instance.objects.current().filter(node=node).select_related("node")):
        try:
            lifecycle.fenced(instance, f"Node {node.name} was fenced by {by}.")
            fenced += 1
        except StaleTransition as error:
            log.info("Overtaken: %s", error)
    log.warning("Node %s was fenced by %s: %d instances given up", node.name, by, fenced)
    return fenced


def remove_node(node: Node) -> None:
    """Delete a node that is gone for good, with the records of its ended instances.

    Raises NodeInUse where it has instances that have not ended, or is heard and so would make its row again.
    """
    if problem := in_use(node):
        raise NodeInUse(problem)
    with transaction.atomic():
        Instance.objects.filter(node=node, state=State.STOPPED).delete()
        node.delete()


def in_use(node: Node) -> str:
    """Why the node cannot be deleted, in a sentence; empty where it can. Raises CoordinationUnavailable."""
    current = Instance.objects.current().filter(node=node).count()
    if current:
        return f"Node {node.name} has {current} instances that have not ended; stop them, or fence the node where it is gone."
    if coordination.beating_nodes([node.name]):
        return f"Node {node.name} is heard and would make its row again; stop its worker first."
    return ""
