"""JSON shapes. Rules that concern more than one field are the services' (model_rules, keys), asked before saving."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any, ClassVar, Generic, TypeVar

from django.conf import settings
from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.db.models import Model
from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from models_app import diagnosis, keys, loads, model_preflight, model_rules, model_status, nodes, run_log
from models_app.api.errors import by_field
from models_app.api.fields import IdOrName, ObjectField
from models_app.contracts import secret_box
from models_app.models import APIKey, Incident, Instance, Load, ModelAlias, ModelConfig, Node, RemoteServer, UsageEvent
from models_app.models.api_key import default_scopes

M = TypeVar("M", bound=Model)

MAX_INT = 2**31 - 1


class CheckedSerializer(serializers.ModelSerializer[M], Generic[M]):
    """Checks the whole row, database constraints included, before it is written."""

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        model: Any = self.Meta.model
        row = copy.copy(self.instance) if self.instance else model()
        for name, value in attrs.items():
            setattr(row, name, value)
        try:
            row.full_clean()
            self.check_row(row, set(attrs))
        except ValidationError as error:
            raise serializers.ValidationError(by_field(error)) from None
        return attrs

    def check_row(self, row: Any, changed: Collection[str]) -> None:
        """Raise ValidationError where the row breaks a rule beyond its own fields and constraints."""


class ModelSerializer(CheckedSerializer[ModelConfig]):
    """A model that is served, as the administrator wants it, with how it is doing."""

    extra_args = ObjectField(required=False, help_text="Further engine settings by name, from the engine's allow-list.")
    aliases: serializers.Field[Any, Any, Any, Any] = serializers.SlugRelatedField(many=True, read_only=True, slug_field="name")
    state = serializers.SerializerMethodField()
    ready_replicas = serializers.SerializerMethodField()
    reason = serializers.SerializerMethodField()
    activity = serializers.SerializerMethodField()

    class Meta:
        model = ModelConfig
        settings_fields: ClassVar = [
            "name", "engine", "chat_model_path", "embedding_model_path", "tts_model_path", "prompt_template", "ctx_size",
            "batch_size", "slots", "threads", "gpu_layers", "extra_args", "min_replicas", "max_replicas", "idle_timeout_s",
            "pinned", "priority", "enabled", "port", "one_process",
        ]  # fmt: skip
        fields: ClassVar = [
            "id", *settings_fields, "aliases", "state", "ready_replicas", "reason", "activity", "created_at", "updated_at",
        ]  # fmt: skip
        read_only_fields: ClassVar = ["created_at", "updated_at"]

    def check_row(self, row: ModelConfig, changed: Collection[str]) -> None:
        model_preflight.check_model(row, changed)

    @extend_schema_field(serializers.ChoiceField(choices=[condition.value for condition in model_status.Condition]))
    def get_state(self, model: ModelConfig) -> str:
        return model_status.status_of(model).condition.value

    def get_ready_replicas(self, model: ModelConfig) -> int:
        return model_status.status_of(model).ready

    def get_reason(self, model: ModelConfig) -> str:
        """Why it is not ready, in one sentence; empty where nothing failed."""
        return model_status.status_of(model).reason

    def get_activity(self, model: ModelConfig) -> str:
        """“loading 40 %, about 12 s”, “waits for memory: …”, “loads when asked”; empty where there is nothing to tell."""
        return model_status.status_of(model).activity


class ModelAliasSerializer(CheckedSerializer[ModelAlias]):
    """Another name for a model. `model` takes the model's id or name."""

    model = IdOrName(queryset=ModelConfig.objects.all())
    model_name = serializers.CharField(source="model.name", read_only=True)

    class Meta:
        model = ModelAlias
        fields: ClassVar = ["id", "name", "model", "model_name"]

    def check_row(self, row: ModelAlias, changed: Collection[str]) -> None:
        model_rules.check_alias(row)


class InstanceSerializer(serializers.ModelSerializer[Instance]):
    """One engine process: what is observed of it."""

    node_name = serializers.CharField(source="node.name", read_only=True)

    class Meta:
        model = Instance
        fields: ClassVar = [
            "id", "model", "model_name", "part", "node", "node_name", "engine", "state", "generation", "slots", "ctx_size",
            "port", "pid", "shim_pid", "created_at", "state_changed_at", "started_at", "ready_at", "deadline_at", "last_used_at",
            "memory_bytes", "cause", "replaces", "hold", "hold_reason", "drain_reason", "drain_detail", "failures",
            "next_attempt_at", "diagnosis", "exit_code", "exit_signal", "exit_reason", "exit_log", "exited_at",
            "peak_memory_bytes",
        ]  # fmt: skip
        read_only_fields: ClassVar = fields


class LogQuerySerializer(serializers.Serializer[dict[str, int]]):
    """Which part of an instance's log is wanted."""

    generation = serializers.IntegerField(required=False, min_value=0, max_value=MAX_INT, help_text="Default: the newest run.")
    lines = serializers.IntegerField(default=200, min_value=1, max_value=run_log.MAX_LINES, help_text="How many of the last.")


class LogSerializer(serializers.Serializer[dict[str, Any]]):
    """The last lines of one run of an instance, as its engine wrote them."""

    generation = serializers.IntegerField()
    generations = serializers.ListField(child=serializers.IntegerField(), help_text="Runs that have a log here, newest first.")
    found = serializers.BooleanField(help_text="Whether this node has a log of that run; it lies on the instance's node.")
    cut = serializers.BooleanField(help_text="Whether there are earlier lines.")
    lines = serializers.ListField(child=serializers.CharField())


class JobSerializer(serializers.ModelSerializer[Load]):
    """One attempt to bring a process of a model up. `progress` is 0 to 1; `eta_s` is null once it ended or nothing is known."""

    node_name = serializers.CharField(source="node.name", read_only=True, default=None)
    eta_s = serializers.SerializerMethodField()
    words = serializers.SerializerMethodField()

    class Meta:
        model = Load
        fields: ClassVar = [
            "id", "model", "model_name", "part", "cause", "stage", "progress", "expected_s", "eta_s", "words", "detail", "node",
            "node_name", "instance", "generation", "created_at", "started_at", "ended_at", "heartbeat_at",
        ]  # fmt: skip
        read_only_fields: ClassVar = fields

    def get_eta_s(self, load: Load) -> float | None:
        return loads.eta_s(load)

    def get_words(self, load: Load) -> str:
        """How it is doing, or how it ended, in a few words."""
        return loads.in_words(load)


class IncidentSerializer(serializers.ModelSerializer[Incident]):
    """One failure as it was diagnosed; `instance` is null once its row is gone, `instance_number` stays."""

    title = serializers.SerializerMethodField()

    class Meta:
        model = Incident
        fields: ClassVar = [
            "id", "at", "last_at", "count", "diagnosis", "title", "reason", "remedy", "instance", "instance_number", "generation",
            "model_name", "part", "node_name", "engine", "exit_code", "exit_signal", "peak_memory_bytes", "log",
        ]  # fmt: skip
        read_only_fields: ClassVar = fields

    def get_title(self, incident: Incident) -> str:
        """The diagnosis in a few words."""
        return diagnosis.title(incident.diagnosis)


class NodeSerializer(CheckedSerializer[Node]):
    """A machine that runs engines. `state` is ready, cordoned, or unknown where its worker has not been heard for 20 s."""

    state = serializers.SerializerMethodField()

    class Meta:
        model = Node
        settings_fields: ClassVar = ["address", "cordoned", "max_instances", "memory_limit_bytes"]
        fields: ClassVar = [
            "id", "name", "state", *settings_fields, "boot_id", "cpu_count", "memory_bytes", "version", "last_seen_at",
            "created_at",
        ]  # fmt: skip
        read_only_fields: ClassVar = ["name", "created_at"]

    @extend_schema_field(serializers.ChoiceField(choices=[state.value for state in nodes.NodeState]))
    def get_state(self, node: Node) -> str:
        return nodes.state_of(node, self.context["heard"]()).value


class RemoteServerSerializer(CheckedSerializer[RemoteServer]):
    """Another server that answers for some models. `secret` is written, never read."""

    models = ObjectField(required=False, help_text='Model names here and their names there: {"ours": "theirs"}.')
    secret = serializers.CharField(write_only=True, required=False, allow_blank=True, max_length=4096, trim_whitespace=True)
    has_secret = serializers.SerializerMethodField()

    class Meta:
        model = RemoteServer
        fields: ClassVar = [
            "id", "name", "kind", "address", "models", "weight", "enabled", "max_in_flight", "secret", "has_secret",
            "created_at", "updated_at",
        ]  # fmt: skip
        read_only_fields: ClassVar = ["created_at", "updated_at"]

    def get_has_secret(self, remote: RemoteServer) -> bool:
        return bool(remote.secret)

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        if "secret" in attrs:
            attrs["secret"] = secret_box.seal(settings.SECRET_KEY, attrs["secret"])
        return super().validate(attrs)

    def check_row(self, row: RemoteServer, changed: Collection[str]) -> None:
        model_rules.check_remote_server(row)


class KeySerializer(serializers.ModelSerializer[APIKey]):
    """A key without its text. `user` takes the user's id or name and cannot be changed later."""

    user = IdOrName(queryset=User.objects.all(), name_field="username")
    username = serializers.CharField(source="user.username", read_only=True)
    scopes = serializers.ListField(child=serializers.CharField(), default=default_scopes, help_text="inference, admin.")
    models = serializers.ListField(child=serializers.CharField(), default=list, help_text="Names; empty allows every model.")
    status = serializers.SerializerMethodField()

    class Meta:
        model = APIKey
        settings_fields: ClassVar = [
            "name", "scopes", "models", "expires_at", "rpm", "tpm", "parallel", "monthly_tokens", "priority", "weight", "private",
        ]  # fmt: skip
        fields: ClassVar = [
            "id", "user", "username", *settings_fields, "public_id", "status", "revoked_at", "last_used_at", "created_at",
        ]  # fmt: skip
        read_only_fields: ClassVar = ["public_id", "revoked_at", "last_used_at", "created_at"]
        validators: ClassVar[list[Any]] = []  # keys.check_key speaks for the unique name, which holds among unrevoked keys only

    @extend_schema_field(serializers.ChoiceField(choices=[status.value for status in keys.KeyStatus]))
    def get_status(self, key: APIKey) -> str:
        return keys.status_of(key).value

    def get_fields(self) -> dict[str, serializers.Field[Any, Any, Any, Any]]:
        fields = super().get_fields()
        if self.instance is not None:
            fields["user"].read_only = True
        return fields

    def create(self, validated_data: dict[str, Any]) -> APIKey:
        """Makes the key and leaves its text in self.key_text for the one answer that shows it."""
        key, self.key_text = keys.create_key(**validated_data, actor=self.context["request"].user)
        return key

    def update(self, instance: APIKey, validated_data: dict[str, Any]) -> APIKey:
        return keys.change_key(instance, actor=self.context["request"].user, **validated_data)


class NewKeySerializer(KeySerializer):
    """The answer to a creation: with the key's text, this once."""

    key = serializers.CharField(read_only=True, help_text="The key itself. It is shown this once and stored nowhere.")

    class Meta(KeySerializer.Meta):
        fields: ClassVar = ["key", *KeySerializer.Meta.fields]


class UserSerializer(serializers.ModelSerializer[User]):
    """An account, as far as choosing a key's owner needs it."""

    class Meta:
        model = User
        fields: ClassVar = ["id", "username", "email", "is_active", "is_staff", "is_superuser", "date_joined", "last_login"]
        read_only_fields: ClassVar = fields


class RequestSerializer(serializers.ModelSerializer[UsageEvent]):
    """One request and what it used. A null count was not reported, which is not zero."""

    class Meta:
        model = UsageEvent
        fields: ClassVar = [
            "id", "request_id", "started_at", "user", "user_name", "key", "key_public_id", "model_name", "backend", "endpoint",
            "stream", "status", "end_reason", "error_code", "prompt_tokens", "cached_tokens", "completion_tokens", "queue_ms",
            "first_token_ms", "total_ms", "gateway",
        ]  # fmt: skip
        read_only_fields: ClassVar = fields
