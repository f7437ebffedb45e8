"""JSON of POST models/{id}/fit/: what may be asked, and what is answered."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

from rest_framework import serializers

from models_app.admission import Kind, Resident
from models_app.api.serializers import ModelSerializer
from models_app.fit import FitReport, PartFit
from models_app.models import ModelConfig


class FitQuery(ModelSerializer):
    """“What if”: settings to be judged instead of the saved ones. Nothing is saved."""

    class Meta(ModelSerializer.Meta):
        fields: ClassVar = [
            "engine", "chat_model_path", "embedding_model_path", "tts_model_path", "one_process", "ctx_size", "batch_size",
            "slots", "gpu_layers", "extra_args", "min_replicas",
        ]  # fmt: skip

    def to_internal_value(self, data: Any) -> Any:
        """A misspelt setting must not be answered as if it had been judged; what else a model has may come along."""
        known = {*ModelSerializer.Meta.fields, *self.fields}
        unknown = [name for name in data if name not in known] if isinstance(data, Mapping) else []
        if unknown:
            raise serializers.ValidationError({name: ["A model has no such setting."] for name in unknown})
        return super().to_internal_value(data)

    def changed(self) -> ModelConfig:
        """The saved model with the changes that were asked about."""
        assert isinstance(self.instance, ModelConfig)
        model = copy.copy(self.instance)
        for name, value in self.validated_data.items():
            setattr(model, name, value)
        return model


class FitPartSerializer(serializers.Serializer[PartFit]):
    """What one process of a part needs, in bytes."""

    part = serializers.CharField()
    processes = serializers.IntegerField(help_text="How many of them are kept running.")
    needs = serializers.IntegerField(source="need.host", help_text="Host memory of one process; shared weights included.")
    weights = serializers.SerializerMethodField(help_text="Model files; mapped ones are shared by processes of the same file.")
    cache = serializers.IntegerField(source="need.cache", help_text="Context of all slots.")
    compute = serializers.IntegerField(source="need.compute")
    program = serializers.IntegerField(source="need.program")
    prompt_cache = serializers.IntegerField(source="need.prompt_cache")
    margin = serializers.IntegerField(source="need.margin")
    gpu = serializers.IntegerField(source="need.gpu", help_text="GPU memory of one process.")
    measured = serializers.IntegerField(
        source="need.measured", help_text="Most that earlier runs with these settings held; 0: none."
    )

    def get_weights(self, part: PartFit) -> int:
        return part.need.mapped + part.need.weights


class UnloadSerializer(serializers.Serializer[Resident]):
    """A process that would be unloaded to make room."""

    instance = serializers.IntegerField(source="instance_id")  # type: ignore[assignment]  # here a field, not the object
    model = serializers.CharField(source="model_name")
    part = serializers.CharField()
    idle_s = serializers.FloatField()


class FitAnswer(serializers.Serializer[FitReport]):
    """Whether the model's processes fit into the node's memory. Sizes in bytes."""

    verdict = serializers.ChoiceField(source="verdict.kind.value", choices=[kind.value for kind in Kind])
    sentence = serializers.CharField(source="verdict.sentence")
    node = serializers.CharField(source="node_name")
    needs = serializers.IntegerField(source="verdict.needs_bytes", help_text="Of what is short: host or GPU memory.")
    free = serializers.IntegerField(source="verdict.free_bytes")
    largest_ctx = serializers.IntegerField(
        source="verdict.largest_ctx", allow_null=True, help_text="The ctx_size that would fit where this one never does."
    )
    unload = UnloadSerializer(source="verdict.victims", many=True)
    parts = FitPartSerializer(many=True)


def answer(report: FitReport) -> dict[str, Any]:
    return dict(FitAnswer(report).data)
