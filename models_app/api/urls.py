"""Routes under /api/v1/."""

from __future__ import annotations

from django.contrib.admin.views.decorators import staff_member_required
from django.urls import path
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerView
from rest_framework.permissions import AllowAny
from rest_framework.routers import DefaultRouter

from models_app.api import schema, views
from models_app.api.permissions import MayEnter

router = DefaultRouter()
router.include_root_view = False
router.include_format_suffixes = False
router.register("models", views.ModelViewSet)
router.register("model-aliases", views.ModelAliasViewSet)
router.register("instances", views.InstanceViewSet)
router.register("jobs", views.JobViewSet)
router.register("incidents", views.IncidentViewSet)
router.register("nodes", views.NodeViewSet)
router.register("remote-servers", views.RemoteServerViewSet)
router.register("keys", views.KeyViewSet)
router.register("users", views.UserViewSet)
router.register("requests", views.RequestViewSet)

app_name = "api"
__all__ = ["schema", "urlpatterns"]  # schema is imported for the extensions it registers
urlpatterns = [
    *router.urls,
    path("schema/", SpectacularAPIView.as_view(permission_classes=[MayEnter]), name="schema"),
    # A page for people: whoever is not signed in is sent to the sign-in page instead of getting a JSON 401.
    path(
        "docs/",
        staff_member_required(SpectacularSwaggerView.as_view(url_name="api:schema", permission_classes=[AllowAny])),
        name="docs",
    ),
]
