"""API keys: made here, shown once, revoked here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from django import forms
from django.contrib import admin, messages
from django.contrib.auth.models import User
from django.db.models import QuerySet
from django.forms import ModelForm
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils import timezone
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import DropdownFilter
from unfold.widgets import UnfoldAdminCheckboxSelectMultipleWidget, UnfoldAdminSelect2MultipleWidget

from models_app import keys
from models_app.admin.base import NOTHING, Admin, RuleForm, age, base_url, column, confirmed, done
from models_app.keys import KeyStatus
from models_app.models import APIKey, Instance
from models_app.models.api_key import ADMIN, INFERENCE

LABELS = {
    KeyStatus.ACTIVE: "success",
    KeyStatus.EXPIRED: "warning",
    KeyStatus.REVOKED: "danger",
    KeyStatus.USER_INACTIVE: "warning",
}
LIMITS = (("rpm", "requests/min"), ("tpm", "tokens/min"), ("parallel", "parallel"), ("monthly_tokens", "tokens/month"))


class APIKeyForm(RuleForm[APIKey]):
    """Checks what keys.py demands; `actor` is set by the admin on a class made per request."""

    actor: ClassVar[User | None] = None
    scopes = forms.MultipleChoiceField(
        choices=[(INFERENCE, "Inference: use /v1"), (ADMIN, "Admin: use /api/v1 with this user's permissions")],
        widget=UnfoldAdminCheckboxSelectMultipleWidget(),
        initial=[INFERENCE],
    )
    models = forms.MultipleChoiceField(
        required=False, widget=UnfoldAdminSelect2MultipleWidget(), help_text="The models it may use; none chosen allows all."
    )

    class Meta:
        model = APIKey
        fields: ClassVar = [
            "user", "name", "scopes", "models", "expires_at", "rpm", "tpm", "parallel", "monthly_tokens", "priority", "weight",
            "private",
        ]  # fmt: skip

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "models" in self.fields:
            names = dict.fromkeys([*keys.known_model_names(), *(self.instance.models or [])])
            choice = self.fields["models"]
            assert isinstance(choice, forms.MultipleChoiceField)
            choice.choices = [(name, name) for name in names]

    def check_row(self, row: APIKey) -> None:
        if row._state.adding and "user" not in self.cleaned_data:
            return  # the form says so already
        if row._state.adding:
            keys.check_new_key(row, actor=self.actor)
        else:
            keys.check_key(row, set(self.changed_data), actor=self.actor)


def example_model(key: APIKey) -> str:
    """A model for the examples: one the key may use, one that is ready rather than not."""
    ready = list(Instance.objects.ready().order_by("model_name").values_list("model_name", flat=True)[:1])
    return (key.models or ready or keys.known_model_names() or ["your-model"])[0]


class StatusFilter(DropdownFilter):  # type: ignore[misc]  # unfold has no types
    title = "status"
    parameter_name = "status"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("active", "Active"), ("expired", "Expired"), ("revoked", "Revoked"), ("unused", "Never used")]

    def queryset(self, request: HttpRequest, found: QuerySet[APIKey]) -> QuerySet[APIKey]:
        now = timezone.now()
        match self.value():
            case "active":
                return found & APIKey.objects.usable()
            case "expired":
                return found.filter(expires_at__lte=now, revoked_at__isnull=True)
            case "revoked":
                return found.filter(revoked_at__isnull=False)
            case "unused":
                return found.filter(last_used_at__isnull=True)
            case _:
                return found


@admin.register(APIKey)
class APIKeyAdmin(Admin[APIKey]):
    form = APIKeyForm
    list_display = ("title", "owner", "status", "may_use", "limits", "expires", "used")
    list_filter = (StatusFilter, "priority")
    list_select_related = ("user",)
    search_fields = ("name", "public_id", "user__username")
    autocomplete_fields = ("user",)
    actions = ("revoke_selected",)
    actions_row = ("revoke",)
    actions_detail = ("revoke",)
    readonly_fields = ("prefix", "status", "created", "used")
    key_fieldsets: ClassVar[tuple[Any, ...]] = (
        ("Permissions", {"fields": ("scopes", "models", "expires_at")}),
        ("Limits", {"fields": (("rpm", "tpm"), ("parallel", "monthly_tokens")), "description": "Empty means no limit."}),
        ("Queueing", {"fields": (("priority", "weight"), "private"), "classes": ("collapse",)}),
    )
    add_fieldsets = ((None, {"fields": (("user", "name"),)}), *key_fieldsets)
    fieldsets = ((None, {"fields": (("user", "name"), ("prefix", "status"), ("created", "used"))}), *key_fieldsets)

    def get_readonly_fields(self, request: HttpRequest, obj: APIKey | None = None) -> tuple[str, ...]:
        return (*self.readonly_fields, "user") if obj is not None else self.readonly_fields

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """A revoked key stays as it was."""
        revoked = isinstance(obj, APIKey) and obj.revoked_at is not None
        return not revoked and super().has_change_permission(request, obj)

    def has_delete_permission(self, request: HttpRequest, obj: APIKey | None = None) -> bool:
        """Keys are revoked; they go with their user only."""
        match = request.resolver_match
        return "apikey" not in ((match.url_name or "") if match else "") and super().has_delete_permission(request, obj)

    def add_view(self, request: HttpRequest, form_url: str = "", extra_context: dict[str, Any] | None = None) -> HttpResponse:
        plain = {"show_save_and_add_another": False, "show_save_and_continue": False}  # both would lead past the key
        return super().add_view(request, form_url, {**(extra_context or {}), **plain})

    def get_changeform_initial_data(self, request: HttpRequest) -> dict[str, Any]:
        """A key for oneself needs no more than a name."""
        return {"user": request.user.pk, **super().get_changeform_initial_data(request)}

    def get_form(
        self, request: HttpRequest, obj: APIKey | None = None, change: bool = False, **kwargs: Any
    ) -> type[ModelForm[APIKey]]:
        form = super().get_form(request, obj, change=change, **kwargs)
        return type(form.__name__, (form,), {"actor": request.user})

    def save_model(self, request: HttpRequest, obj: APIKey, form: ModelForm[APIKey], change: bool) -> None:
        if change:
            super().save_model(request, obj, form, change)
        else:
            request.new_key_text = keys.save_new_key(obj)  # type: ignore[attr-defined]  # for response_add, nowhere else

    def response_add(self, request: HttpRequest, obj: APIKey, post_url_continue: str | None = None) -> HttpResponse:
        """The one page that shows the key: the answer to this POST. Nothing can be reloaded into showing it again."""
        context = {
            **self.admin_site.each_context(request),
            "title": f"Key “{obj.name}” of {obj.user.get_username()}",
            "key": obj,
            "text": request.new_key_text,  # type: ignore[attr-defined]
            "base_url": base_url(request),
            "model": example_model(obj),
            "detail_url": reverse("admin:models_app_apikey_change", args=[obj.pk]),
            "list_url": reverse("admin:models_app_apikey_changelist"),
        }
        return TemplateResponse(request, "models_app/new_key.html", context, headers={"Cache-Control": "no-store"})

    @column("key", ordering="name", header=True)
    def title(self, key: APIKey) -> Sequence[str]:
        return (key.name, f"ast_{key.public_id}…")

    @column("user", ordering="user__username")
    def owner(self, key: APIKey) -> str:
        return key.user.get_username()

    @column("status", label=LABELS)
    def status(self, key: APIKey) -> KeyStatus:
        return keys.status_of(key)

    @column("may use")
    def may_use(self, key: APIKey) -> str:
        models = ", ".join(key.models[:2]) + (f" and {len(key.models) - 2} more" if len(key.models) > 2 else "")
        return f"{models or 'every model'}{' · admin API' if ADMIN in key.scopes else ''}"

    @column("limits")
    def limits(self, key: APIKey) -> str:
        given = [f"{getattr(key, field):,} {unit}" for field, unit in LIMITS if getattr(key, field) is not None]
        return ", ".join(given) or "none"

    @column("expires", ordering="expires_at")
    def expires(self, key: APIKey) -> SafeString | str:
        return age(key.expires_at) if key.expires_at else "never"

    @column("last used", ordering="last_used_at")
    def used(self, key: APIKey) -> SafeString | str:
        return age(key.last_used_at) if key.last_used_at else "never"

    @column("created")
    def created(self, key: APIKey) -> SafeString | str:
        return age(key.created_at) if key.pk else NOTHING

    @column("prefix")
    def prefix(self, key: APIKey) -> str:
        return f"ast_{key.public_id}…"

    @confirmed("Revoke", "The key is refused from now on, within a second, for good.", icon="key_off", dangerous=True)
    def revoke(self, request: HttpRequest, form: forms.Form, object_id: str) -> HttpResponse:
        key = self.row(request, object_id)
        here = reverse("admin:models_app_apikey_changelist")
        if not keys.revoke_key(key):
            return done(request, f"{key} was revoked already.", fallback=here, level=messages.INFO)
        self.log_change(request, key, "revoked")
        return done(request, f"{key} is revoked.", fallback=here)

    @admin.action(description="Revoke", permissions=["change"])
    def revoke_selected(self, request: HttpRequest, found: QuerySet[APIKey]) -> None:
        revoked = [str(key) for key in found if keys.revoke_key(key)]
        self.message_user(request, f"Revoked: {', '.join(revoked) or 'none; they were revoked already'}.", messages.SUCCESS)
