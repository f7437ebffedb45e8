"""Keys of people and services. The text of a key is never stored (models_app/contracts/key_material.py)."""

from __future__ import annotations

from typing import ClassVar

from django.conf import settings
from django.core.validators import MinValueValidator
from django.db import models as orm  # a field here is called `models`
from django.db.models import Q
from django.db.models.functions import Now
from django.utils import timezone

from models_app.models.revision import Revisioned

INFERENCE = "inference"
ADMIN = "admin"
SCOPES = (INFERENCE, ADMIN)


def default_scopes() -> list[str]:
    return [INFERENCE]


class APIKeyQuerySet(orm.QuerySet["APIKey"]):
    def usable(self) -> APIKeyQuerySet:
        """Neither revoked nor expired, and its user is active."""
        return self.filter(
            Q(expires_at__isnull=True) | Q(expires_at__gt=timezone.now()), revoked_at__isnull=True, user__is_active=True
        )


class APIKey(Revisioned):
    """Limits are per key; empty means none. An empty `models` list allows every model."""

    class Priority(orm.TextChoices):
        INTERACTIVE = "interactive", "Interactive"
        NORMAL = "normal", "Normal"
        BULK = "bulk", "Bulk"

    user = orm.ForeignKey(settings.AUTH_USER_MODEL, on_delete=orm.CASCADE, related_name="api_keys")
    name = orm.CharField(max_length=128)
    public_id = orm.CharField(max_length=10, unique=True, editable=False, help_text="The key's readable part.")
    digest = orm.CharField(max_length=64, unique=True, editable=False, help_text="SHA-256 of the key.")
    scopes = orm.JSONField(default=default_scopes, help_text="inference, admin.")
    models = orm.JSONField(default=list, blank=True, help_text="Names of the models it may use; empty allows all.")
    expires_at = orm.DateTimeField(null=True, blank=True)
    rpm = orm.PositiveIntegerField(null=True, blank=True, validators=[MinValueValidator(1)], verbose_name="requests per minute")
    tpm = orm.PositiveIntegerField(null=True, blank=True, validators=[MinValueValidator(1)], verbose_name="tokens per minute")
    parallel = orm.PositiveIntegerField(
        null=True, blank=True, validators=[MinValueValidator(1)], verbose_name="parallel requests"
    )
    monthly_tokens = orm.BigIntegerField(null=True, blank=True, validators=[MinValueValidator(1)])
    priority = orm.CharField(max_length=16, choices=Priority.choices, default=Priority.NORMAL)
    weight = orm.FloatField(default=1.0, validators=[MinValueValidator(0.01)])
    private = orm.BooleanField(default=False, help_text="Its prompts never share a prefix cache with other keys.")
    revoked_at = orm.DateTimeField(null=True, blank=True, editable=False)
    last_used_at = orm.DateTimeField(null=True, editable=False)
    created_at = orm.DateTimeField(db_default=Now(), editable=False)

    objects = APIKeyQuerySet.as_manager()

    class Meta:
        ordering: ClassVar = ["-id"]
        verbose_name = "API key"
        constraints: ClassVar = [
            orm.UniqueConstraint(
                fields=["user", "name"],
                condition=Q(revoked_at__isnull=True),
                name="api_key_name_unique_per_user",
                violation_error_message="This user already has a key of that name.",
            ),
            orm.CheckConstraint(condition=Q(priority__in=["interactive", "normal", "bulk"]), name="api_key_priority_known"),
            orm.CheckConstraint(condition=Q(weight__gt=0), name="api_key_weight_positive"),
        ]

    def __str__(self) -> str:
        return f"{self.name} (ast_{self.public_id}…)"
