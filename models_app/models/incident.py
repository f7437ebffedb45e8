"""Ends of engine processes that nobody asked for, and starts that were refused: kept after the instance has recovered."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.db.models.functions import Now

from models_app.models.instance import Instance


class Incident(models.Model):
    """One failure with its diagnosis. The same refusal of the same instance again is counted, not repeated."""

    instance = models.ForeignKey(Instance, null=True, on_delete=models.SET_NULL, related_name="incidents")
    instance_number = models.BigIntegerField(help_text="The instance's id, kept when its row goes.")
    generation = models.PositiveIntegerField(default=0)
    model_name = models.CharField(max_length=128)
    part = models.CharField(max_length=16, default="chat")
    node_name = models.CharField(max_length=63)
    engine = models.CharField(max_length=32)
    at = models.DateTimeField(db_default=Now())
    last_at = models.DateTimeField(db_default=Now(), help_text="When it was last seen again.")
    count = models.PositiveIntegerField(default=1)
    diagnosis = models.CharField(max_length=32, help_text="The kind of failure, in one word.")
    reason = models.TextField(help_text="What happened, in one sentence.")
    remedy = models.TextField(blank=True, help_text="What to do about it, in one sentence.")
    exit_code = models.IntegerField(null=True)
    exit_signal = models.IntegerField(null=True)
    peak_memory_bytes = models.BigIntegerField(null=True)
    log = models.TextField(blank=True, help_text="The engine's last lines.")

    class Meta:
        ordering: ClassVar = ["-at", "-id"]
        indexes: ClassVar = [
            models.Index(fields=["-at", "-id"], name="incident_newest"),  # the list, and pruning
            models.Index(fields=["model_name", "-at"], name="incident_by_model"),  # a model's page
            models.Index(fields=["instance_number", "-at"], name="incident_by_instance"),  # an instance's page
        ]

    def __str__(self) -> str:
        return f"incident {self.pk} of {self.model_name}#{self.instance_number}"
