"""Another server that answers for some models."""

from __future__ import annotations

from typing import ClassVar

from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models as orm  # a field here is called `models`
from django.db.models import Q
from django.db.models.functions import Now

from models_app.models.revision import Revisioned


class RemoteServerQuerySet(orm.QuerySet["RemoteServer"]):
    def usable(self) -> RemoteServerQuerySet:
        return self.filter(enabled=True)


class RemoteServer(Revisioned):
    """A peer Assistant or any OpenAI-compatible server. `secret` is encrypted at rest and write-only."""

    class Kind(orm.TextChoices):
        ASSISTANT = "assistant", "Assistant (gRPC)"
        OPENAI = "openai", "OpenAI-compatible (HTTP)"

    name = orm.CharField(max_length=128, unique=True)
    kind = orm.CharField(max_length=16, choices=Kind.choices, default=Kind.OPENAI)
    address = orm.CharField(max_length=512, help_text="openai: base URL ending in /v1. assistant: host:port.")
    models = orm.JSONField(
        default=dict, blank=True, help_text='Model names offered here and their names there: {"ours": "theirs"}.'
    )
    weight = orm.FloatField(default=1.0, validators=[MinValueValidator(0.0), MaxValueValidator(1000.0)])
    enabled = orm.BooleanField(default=True)
    max_in_flight = orm.PositiveIntegerField(
        default=16, validators=[MinValueValidator(1)], help_text="Requests sent there at once, at most."
    )
    secret = orm.TextField(blank=True, editable=False, help_text="Bearer token for it, encrypted at rest.")
    created_at = orm.DateTimeField(db_default=Now(), editable=False)
    updated_at = orm.DateTimeField(auto_now=True, editable=False)

    objects = RemoteServerQuerySet.as_manager()

    class Meta:
        ordering: ClassVar = ["name"]
        constraints: ClassVar = [
            orm.CheckConstraint(condition=Q(kind__in=["assistant", "openai"]), name="remote_kind_known"),
            orm.CheckConstraint(condition=Q(weight__gte=0), name="remote_weight_not_negative"),
            orm.CheckConstraint(condition=Q(max_in_flight__gte=1), name="remote_max_in_flight_positive"),
            orm.CheckConstraint(condition=~Q(address=""), name="remote_has_address"),
        ]

    def __str__(self) -> str:
        return self.name
