"""A machine that runs engines."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.db.models.functions import Now


class Node(models.Model):
    """One host with a worker on queue node.<name>. Heartbeats live in Valkey; last_seen_at is written now and then."""

    name = models.CharField(max_length=63, unique=True)
    address = models.CharField(max_length=255, default="127.0.0.1", help_text="Where gateways reach this node's engines.")
    cordoned = models.BooleanField(default=False, help_text="No new instances are placed here.")
    max_instances = models.PositiveIntegerField(
        null=True, blank=True, help_text="Engine processes this node runs at most; empty: as many as fit."
    )
    memory_limit_bytes = models.BigIntegerField(
        null=True, blank=True, help_text="Bytes all engines of this node may use together; empty: whatever is free."
    )
    boot_id = models.CharField(max_length=36, blank=True, editable=False)
    cpu_count = models.PositiveIntegerField(null=True, editable=False)
    memory_bytes = models.BigIntegerField(null=True, editable=False)
    version = models.CharField(max_length=40, blank=True, editable=False)
    last_seen_at = models.DateTimeField(null=True, editable=False)
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        ordering: ClassVar = ["name"]
        constraints: ClassVar = [
            models.CheckConstraint(condition=~models.Q(name=""), name="node_has_name"),
            models.CheckConstraint(
                condition=models.Q(memory_limit_bytes__isnull=True) | models.Q(memory_limit_bytes__gt=0),
                name="node_memory_limit_positive",
                violation_error_message="memory_limit_bytes must be above 0, or empty for no limit.",
            ),
        ]

    def __str__(self) -> str:
        return self.name
