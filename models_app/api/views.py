"""Resources and their actions. A view finds the row and calls one service; writes about what should run ask for a reconcile."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

from django.contrib.auth.models import User
from django.db.models import Model
from drf_spectacular.utils import extend_schema
from rest_framework import mixins, status, viewsets
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import BaseSerializer

from models_app import fencing, fit, keys, model_status, nodes, operations, run_log, tasks
from models_app.api import serializers
from models_app.api.fit import FitAnswer, FitQuery, answer
from models_app.api.listing import NewestFirst
from models_app.api.permissions import MayOperate
from models_app.models import APIKey, Incident, Instance, Load, ModelAlias, ModelConfig, Node, RemoteServer, UsageEvent

NO_STORE = {"Cache-Control": "no-store"}


def operate(**kwargs: Any) -> Callable[[Any], Any]:
    """An action on one item: POST without a body, the “change” permission."""
    return action(detail=True, methods=["post"], permission_classes=[MayOperate], **kwargs)


class ReconcilingMixin:
    """Every write asks for a reconcile once it is committed."""

    def perform_create(self, serializer: BaseSerializer[Any]) -> None:
        serializer.save()
        tasks.request_reconcile()

    def perform_update(self, serializer: BaseSerializer[Any]) -> None:
        serializer.save()
        tasks.request_reconcile()

    def perform_destroy(self, instance: Model) -> None:
        instance.delete()
        tasks.request_reconcile()


class ModelViewSet(ReconcilingMixin, viewsets.ModelViewSet[ModelConfig]):
    """Models that are served. start and stop change `enabled`; restart replaces the running processes."""

    queryset = model_status.with_current_instances(ModelConfig.objects.all()).prefetch_related("aliases")
    serializer_class = serializers.ModelSerializer
    filter_fields: ClassVar = {"name": "name", "engine": "engine", "enabled": "enabled", "pinned": "pinned"}
    ordering_fields: ClassVar = ["id", "name", "priority", "created_at", "updated_at"]

    @extend_schema(request=None)
    @operate()
    def start(self, request: Request, pk: str) -> Response:
        """Enable the model; its processes start as soon as a worker sees it."""
        return self._operate(operations.start_model)

    @extend_schema(request=None)
    @operate()
    def stop(self, request: Request, pk: str) -> Response:
        """Disable the model; running requests may end first."""
        return self._operate(operations.stop_model)

    @extend_schema(request=None)
    @operate()
    def restart(self, request: Request, pk: str) -> Response:
        """Replace every process of the model; a crash loop is forgotten."""
        return self._operate(operations.restart_model)

    @extend_schema(request=FitQuery(partial=True), responses=FitAnswer)
    @operate()
    def fit(self, request: Request, pk: str) -> Response:
        """Say whether the model fits into this node's memory, as saved or with the settings given. Changes nothing."""
        query = FitQuery(self.get_object(), data=request.data, partial=True, context=self.get_serializer_context())
        query.is_valid(raise_exception=True)
        return Response(answer(fit.judge_model(query.changed())))

    def _operate(self, operation: Callable[[ModelConfig], Any]) -> Response:
        operation(self.get_object())
        tasks.request_reconcile()
        return Response(self.get_serializer(self.get_object()).data, status=status.HTTP_202_ACCEPTED)


class ModelAliasViewSet(ReconcilingMixin, viewsets.ModelViewSet[ModelAlias]):
    """Other names of models."""

    queryset = ModelAlias.objects.select_related("model")
    serializer_class = serializers.ModelAliasSerializer
    filter_fields: ClassVar = {"name": "name", "model": "model", "model_name": "model__name"}
    ordering_fields: ClassVar = ["id", "name"]


class InstanceViewSet(viewsets.ReadOnlyModelViewSet[Instance]):
    """Engine processes. They follow from models; one can be restarted or stopped."""

    queryset = Instance.objects.select_related("node")
    serializer_class = serializers.InstanceSerializer
    filter_fields: ClassVar = {
        "state": "state", "model": "model", "model_name": "model_name", "node": "node", "node_name": "node__name",
        "engine": "engine",
    }  # fmt: skip
    ordering_fields: ClassVar = ["id", "model_name", "state", "state_changed_at", "created_at"]

    @extend_schema(request=None)
    @operate()
    def restart(self, request: Request, pk: str) -> Response:
        """End this process and start another generation of it."""
        return self._operate(operations.restart_instance)

    @extend_schema(request=None)
    @operate()
    def stop(self, request: Request, pk: str) -> Response:
        """End this process for good; the model gets another if it wants one."""
        return self._operate(operations.stop_instance)

    @extend_schema(parameters=[serializers.LogQuerySerializer], responses=serializers.LogSerializer, filters=False)
    @action(detail=True, methods=["get"])
    def log(self, request: Request, pk: str) -> Response:
        """The last lines of one run's log: a process and each of its restarts is a run (generation)."""
        instance = self.get_object()
        asked = serializers.LogQuerySerializer(data=request.query_params)
        asked.is_valid(raise_exception=True)
        generations = run_log.runs(instance.pk)
        newest = generations[0] if generations else instance.generation
        generation = asked.validated_data.get("generation", newest)
        tail = run_log.tail(instance.pk, generation, asked.validated_data["lines"])
        told = {
            "generation": generation,
            "generations": generations,
            "found": tail.found,
            "cut": tail.cut,
            "lines": tail.lines,
        }
        return Response(serializers.LogSerializer(told).data, headers=NO_STORE)

    def _operate(self, operation: Callable[[Instance], Any]) -> Response:
        operation(self.get_object())
        tasks.request_reconcile()
        return Response(self.get_serializer(self.get_object()).data, status=status.HTTP_202_ACCEPTED)


class JobViewSet(viewsets.ReadOnlyModelViewSet[Load]):
    """Loads: what is being started, for whom, how far it is; the newest 200 of each model are kept."""

    queryset = Load.objects.select_related("node")
    serializer_class = serializers.JobSerializer
    filter_fields: ClassVar = {
        "stage": "stage", "cause": "cause", "model": "model", "model_name": "model_name", "part": "part", "node": "node",
        "node_name": "node__name", "instance": "instance", "since": "created_at__gte", "until": "created_at__lt",
    }  # fmt: skip
    ordering_fields: ClassVar = ["id", "created_at", "ended_at"]


class IncidentViewSet(viewsets.ReadOnlyModelViewSet[Incident]):
    """Failures of engine processes and refused starts, as they were diagnosed; the newest 1,000 of 90 days are kept."""

    queryset = Incident.objects.all()
    serializer_class = serializers.IncidentSerializer
    filter_fields: ClassVar = {
        "diagnosis": "diagnosis", "model_name": "model_name", "instance": "instance_number", "generation": "generation",
        "node_name": "node_name", "engine": "engine", "part": "part", "since": "at__gte", "until": "at__lt",
    }  # fmt: skip
    ordering_fields: ClassVar = ["id", "at", "last_at"]


class NodeViewSet(ReconcilingMixin, mixins.UpdateModelMixin, mixins.DestroyModelMixin, viewsets.ReadOnlyModelViewSet[Node]):
    """Machines that run engines. They make their own rows; one that is gone for good can be fenced and then deleted."""

    queryset = Node.objects.all()
    serializer_class = serializers.NodeSerializer
    http_method_names = ["get", "head", "options", "post", "patch", "delete"]  # noqa: RUF012  # an instance variable to Django's types
    filter_fields: ClassVar = {"name": "name", "cordoned": "cordoned"}
    ordering_fields: ClassVar = ["id", "name", "last_seen_at"]

    @extend_schema(request=None)
    @operate()
    def cordon(self, request: Request, pk: str) -> Response:
        """Keep new processes off it; those that run stay."""
        return self._operate(lambda node: fencing.cordon_node(node, True))

    @extend_schema(request=None)
    @operate()
    def uncordon(self, request: Request, pk: str) -> Response:
        """Let new processes be placed on it again."""
        return self._operate(lambda node: fencing.cordon_node(node, False))

    @extend_schema(request=None)
    @operate()
    def fence(self, request: Request, pk: str) -> Response:
        """Give up everything on a silent node, so that it is started elsewhere. Refused while the node is heard."""
        return self._operate(lambda node: fencing.fence_node(node, request.user.get_username()))

    def get_serializer_context(self) -> dict[str, Any]:
        """heard: asks, once for all rows of the answer, which nodes beat."""
        return {**super().get_serializer_context(), "heard": cache(lambda: nodes.heard(Node.objects.all()))}

    def perform_destroy(self, instance: Model) -> None:
        assert isinstance(instance, Node)
        fencing.remove_node(instance)
        tasks.request_reconcile()

    def _operate(self, operation: Callable[[Node], Any]) -> Response:
        operation(self.get_object())
        tasks.request_reconcile()
        return Response(self.get_serializer(self.get_object()).data, status=status.HTTP_202_ACCEPTED)


class RemoteServerViewSet(viewsets.ModelViewSet[RemoteServer]):
    """Other servers that answer for some models."""

    queryset = RemoteServer.objects.all()
    serializer_class = serializers.RemoteServerSerializer
    filter_fields: ClassVar = {"name": "name", "kind": "kind", "enabled": "enabled"}
    ordering_fields: ClassVar = ["id", "name", "weight", "created_at"]


class KeyViewSet(mixins.CreateModelMixin, mixins.UpdateModelMixin, viewsets.ReadOnlyModelViewSet[APIKey]):
    """Keys of people and services. They are revoked, never deleted: what used them stays readable."""

    queryset = APIKey.objects.select_related("user")
    serializer_class = serializers.KeySerializer
    http_method_names = ["get", "head", "options", "post", "patch"]  # noqa: RUF012
    filter_fields: ClassVar = {"name": "name", "user": "user", "username": "user__username", "public_id": "public_id"}
    ordering_fields: ClassVar = ["id", "name", "expires_at", "last_used_at", "created_at"]

    @extend_schema(responses={201: serializers.NewKeySerializer})
    def create(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Make a key. Its text is in this answer, once, and stored nowhere."""
        serializer = serializers.KeySerializer(data=request.data, context=self.get_serializer_context())
        serializer.is_valid(raise_exception=True)
        serializer.save()
        told = {"key": serializer.key_text, **serializer.data}
        return Response(told, status=status.HTTP_201_CREATED, headers=NO_STORE)

    @extend_schema(request=None)
    @operate()
    def revoke(self, request: Request, pk: str) -> Response:
        """Refuse this key from now on, for good. Gateways know within a second. Repeating it changes nothing."""
        key = self.get_object()
        keys.revoke_key(key)
        return Response(self.get_serializer(key).data)


class UserViewSet(viewsets.ReadOnlyModelViewSet[User]):
    """Accounts, to choose a key's owner from. They are managed in the admin."""

    queryset = User.objects.order_by("id")
    serializer_class = serializers.UserSerializer
    filter_fields: ClassVar = {"username": "username", "is_active": "is_active", "is_staff": "is_staff"}
    ordering_fields: ClassVar = ["id", "username", "date_joined", "last_login"]


class RequestViewSet(viewsets.ReadOnlyModelViewSet[UsageEvent]):
    """What was asked and what it used, newest first."""

    queryset = UsageEvent.objects.all()
    serializer_class = serializers.RequestSerializer
    pagination_class = NewestFirst
    filter_fields: ClassVar = {
        "request_id": "request_id", "user": "user", "key": "key", "user_name": "user_name", "key_public_id": "key_public_id",
        "model_name": "model_name", "endpoint": "endpoint", "status": "status", "end_reason": "end_reason", "stream": "stream",
        "since": "started_at__gte", "until": "started_at__lt",
    }  # fmt: skip
    ordering_fields: ClassVar = ["started_at"]
