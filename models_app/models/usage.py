"""What was used: one row a request, ingested from the gateways' spool files."""

from __future__ import annotations

from typing import ClassVar

from django.conf import settings
from django.db import models

from models_app.models.api_key import APIKey


class UsageEvent(models.Model):
    """One request. Token counts are null where the backend did not report them: that is not zero.

    The names beside the foreign keys are kept when key, user or model are deleted.
    """

    class End(models.TextChoices):
        STOP = "stop"
        LENGTH = "length"
        TOOL_CALLS = "tool_calls"
        CLIENT_GONE = "client_gone"
        ERROR = "error"
        GATEWAY_LOST = "gateway_lost"

    request_id = models.CharField(max_length=64, unique=True)
    started_at = models.DateTimeField(db_index=True)
    user = models.ForeignKey(settings.AUTH_USER_MODEL, null=True, on_delete=models.SET_NULL, related_name="usage_events")
    key = models.ForeignKey(APIKey, null=True, on_delete=models.SET_NULL, related_name="usage_events")
    user_name = models.CharField(max_length=150, blank=True)
    key_public_id = models.CharField(max_length=10, blank=True)
    model_name = models.CharField(max_length=128, blank=True)
    backend = models.CharField(max_length=160, blank=True, help_text="instance:<id>:<generation> or remote:<name>.")
    endpoint = models.CharField(max_length=64)
    stream = models.BooleanField(default=False)
    status = models.PositiveSmallIntegerField(help_text="HTTP status the client got; 0 if it never got one.")
    end_reason = models.CharField(max_length=16, choices=End.choices)
    error_code = models.CharField(max_length=64, blank=True)
    prompt_tokens = models.PositiveIntegerField(null=True)
    cached_tokens = models.PositiveIntegerField(null=True)
    completion_tokens = models.PositiveIntegerField(null=True)
    queue_ms = models.FloatField(null=True)
    first_token_ms = models.FloatField(
        null=True, help_text="From receipt to a stream's first content; unknown for an answer that came whole."
    )
    total_ms = models.FloatField(null=True)
    gateway = models.CharField(max_length=80, blank=True)

    class Meta:
        verbose_name = "request"
        ordering: ClassVar = ["-started_at", "-id"]
        indexes: ClassVar = [
            models.Index(fields=["user", "-started_at"], name="usage_by_user"),  # "my usage", a user's requests
            models.Index(fields=["key", "-started_at"], name="usage_by_key"),  # a key's requests
            models.Index(fields=["model_name", "-started_at"], name="usage_by_model"),  # a model's requests
        ]

    def __str__(self) -> str:
        return self.request_id
