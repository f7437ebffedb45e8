"""What the administrator wants served."""

from __future__ import annotations

from typing import ClassVar

from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models
from django.db.models import F, Q
from django.db.models.functions import Now

from models_app.contracts.traits import engine_choices, parts_of, roles_of
from models_app.models.revision import Revisioned

MODEL_NAME = RegexValidator(
    r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*\Z", "Use letters, digits and . _ : / @ + - and start with a letter or digit."
)


class ModelConfigQuerySet(models.QuerySet["ModelConfig"]):
    def enabled(self) -> ModelConfigQuerySet:
        return self.filter(enabled=True)


class ModelConfig(Revisioned):
    """Desired state of one model. Sizes are per request and per process as their help texts say."""

    name = models.CharField(max_length=128, unique=True, validators=[MODEL_NAME], help_text="What clients put in “model”.")
    engine = models.CharField(max_length=32, choices=engine_choices, default="embedded")
    chat_model_path = models.CharField(max_length=1024, blank=True, help_text="GGUF file of the chat model on the node.")
    embedding_model_path = models.CharField(max_length=1024, blank=True, help_text="GGUF file of the embedding model.")
    tts_model_path = models.CharField(max_length=1024, blank=True, help_text="GGUF file of the speech model.")
    prompt_template = models.CharField(
        max_length=64, blank=True, help_text="Name of a built-in chat template; empty uses the one in the model file."
    )
    ctx_size = models.PositiveIntegerField(
        default=4096, validators=[MinValueValidator(64)], help_text="Tokens one request may use (prompt and answer)."
    )
    batch_size = models.PositiveIntegerField(
        default=512, validators=[MinValueValidator(1)], help_text="Prompt tokens evaluated at once."
    )
    slots = models.PositiveIntegerField(
        default=2, validators=[MinValueValidator(1), MaxValueValidator(256)], help_text="Requests one process serves at once."
    )
    threads = models.PositiveIntegerField(default=0, help_text="CPU threads of one process; 0 lets the engine choose.")
    gpu_layers = models.IntegerField(
        default=0, validators=[MinValueValidator(-1)], help_text="Layers on the GPU: 0 none, -1 all."
    )
    one_process = models.BooleanField(
        default=False,
        help_text="Serve chat, embeddings and speech of this model from one process, where the engine can.",
    )
    extra_args = models.JSONField(
        default=dict, blank=True, help_text="Further engine settings by name, from the engine's allow-list."
    )
    min_replicas = models.PositiveIntegerField(default=1, help_text="Processes kept running while enabled.")
    max_replicas = models.PositiveIntegerField(default=1, validators=[MinValueValidator(1)], help_text="Processes at most.")
    idle_timeout_s = models.PositiveIntegerField(
        default=0, help_text="Seconds without a request after which a process above the minimum unloads; 0 never."
    )
    pinned = models.BooleanField(default=False, help_text="Never unloaded to make room.")
    priority = models.IntegerField(default=0, help_text="Higher is evicted later.")
    enabled = models.BooleanField(default=True)
    port = models.PositiveIntegerField(
        null=True,
        blank=True,
        validators=[MinValueValidator(1024), MaxValueValidator(65535)],
        help_text="Fixed loopback port of the process; empty takes a free one. Needs max_replicas 1.",
    )
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    updated_at = models.DateTimeField(auto_now=True, editable=False)

    objects = ModelConfigQuerySet.as_manager()

    class Meta:
        ordering: ClassVar = ["name"]
        verbose_name = "model"
        constraints: ClassVar = [
            models.CheckConstraint(
                condition=~Q(chat_model_path="", embedding_model_path="", tts_model_path=""),
                name="model_has_a_path",
                violation_error_message="Give at least one of chat_model_path, embedding_model_path, tts_model_path.",
            ),
            models.CheckConstraint(
                condition=Q(min_replicas__lte=F("max_replicas")),
                name="model_min_not_above_max",
                violation_error_message="min_replicas must not be above max_replicas.",
            ),
            models.CheckConstraint(
                condition=Q(port__isnull=True) | Q(max_replicas=1),
                name="model_fixed_port_needs_one_replica",
                violation_error_message="A fixed port needs max_replicas 1.",
            ),
            models.UniqueConstraint(
                fields=["port"],
                condition=Q(port__isnull=False),
                name="model_port_unique",
                violation_error_message="Another model already has this port.",
            ),
            models.CheckConstraint(condition=Q(slots__gte=1), name="model_has_a_slot"),
            models.CheckConstraint(condition=Q(ctx_size__gte=64), name="model_ctx_size_at_least_64"),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def roles(self) -> tuple[str, ...]:
        """What it serves: of chat, embedding and speech those that have a file."""
        return roles_of(self.chat_model_path, self.embedding_model_path, self.tts_model_path)

    @property
    def parts(self) -> tuple[str, ...]:
        """The processes one replica consists of; replicas are counted for each."""
        return parts_of(self.roles, self.one_process)


class ModelAlias(Revisioned):
    """Another name for a model. A name is either a model's or an alias's; the forms check that across tables."""

    name = models.CharField(max_length=128, unique=True, validators=[MODEL_NAME])
    model = models.ForeignKey(ModelConfig, on_delete=models.CASCADE, related_name="aliases")

    class Meta:
        ordering: ClassVar = ["name"]
        verbose_name = "model alias"
        verbose_name_plural = "model aliases"

    def __str__(self) -> str:
        return f"{self.name} → {self.model.name}"
