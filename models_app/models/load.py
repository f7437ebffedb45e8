"""Attempts to bring a replica up: what requests wait for, and what later estimates are learned from."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.db.models import Q
from django.db.models.functions import Now

from models_app.models import instance as replica
from models_app.models.instance import Instance
from models_app.models.model_config import ModelConfig
from models_app.models.node import Node


class Load(models.Model):
    """One attempt, from the moment a process is wanted until it is READY or is not.

    Open while `ended_at` is null: one open load per instance and generation to come. heartbeat_at moves while somebody
    looks after it. Names beside foreign keys are kept when their rows go.
    """

    Cause = replica.Cause

    class Stage(models.TextChoices):
        WAITING = "waiting"
        LOADING = "loading"
        READY = "ready"
        FAILED = "failed"
        CANCELLED = "cancelled"

    model = models.ForeignKey(ModelConfig, null=True, on_delete=models.SET_NULL, related_name="loads")
    model_name = models.CharField(max_length=128)
    part = models.CharField(max_length=16, default="chat")
    node = models.ForeignKey(Node, null=True, on_delete=models.SET_NULL, related_name="loads")
    instance = models.ForeignKey(Instance, null=True, on_delete=models.SET_NULL, related_name="loads")
    generation = models.PositiveIntegerField(default=0, help_text="Of the process, once there is one.")
    launch_digest = models.CharField(max_length=64, blank=True)
    cause = models.CharField(max_length=16, choices=Cause.choices)
    stage = models.CharField(max_length=16, choices=Stage.choices, default=Stage.WAITING)
    detail = models.TextField(blank=True, help_text="One sentence: what it waits for, or how it ended.")
    progress = models.FloatField(default=0.0, help_text="Share of the load that is done, 0 to 1.")
    expected_s = models.FloatField(null=True, help_text="Seconds earlier loads of this kind took; empty where there were none.")
    created_at = models.DateTimeField(db_default=Now())
    started_at = models.DateTimeField(null=True, help_text="When its process was started.")
    ended_at = models.DateTimeField(null=True)
    heartbeat_at = models.DateTimeField(null=True)

    class Meta:
        ordering: ClassVar = ["-id"]
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["instance"],
                condition=Q(ended_at__isnull=True, instance__isnull=False),
                name="load_one_open_per_instance",
            ),
        ]
        indexes: ClassVar = [
            models.Index(fields=["model_name", "part", "-id"], name="load_by_model"),  # how long did it take before?
            models.Index(fields=["id"], condition=Q(ended_at__isnull=True), name="load_open"),  # what is under way now
        ]

    def __str__(self) -> str:
        return f"load {self.pk} of {self.model_name} ({self.part})"
