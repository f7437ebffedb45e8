"""Other servers that answer for some models. Their secret is written here and never read back."""

from __future__ import annotations

from typing import Any, ClassVar

from django import forms
from django.conf import settings
from django.contrib import admin
from django.forms import ModelForm
from django.http import HttpRequest
from unfold.widgets import UnfoldAdminPasswordWidget, UnfoldAdminTextareaWidget, UnfoldBooleanSwitchWidget

from models_app import model_rules
from models_app.admin.base import NOTHING, Admin, RuleForm, column
from models_app.contracts import secret_box
from models_app.models import RemoteServer


class RemoteServerForm(RuleForm[RemoteServer]):
    new_secret = forms.CharField(
        label="Secret",
        required=False,
        max_length=4096,
        widget=UnfoldAdminPasswordWidget(attrs={"autocomplete": "new-password"}),
        help_text="Bearer token sent to it. Encrypted at rest and never shown; leave empty to keep the present one.",
    )
    forget_secret = forms.BooleanField(
        label="Forget the present secret", required=False, widget=UnfoldBooleanSwitchWidget(), help_text="Send none from now on."
    )

    class Meta:
        model = RemoteServer
        fields: ClassVar = ["name", "kind", "address", "models", "weight", "max_in_flight", "enabled"]
        widgets: ClassVar = {"models": UnfoldAdminTextareaWidget(attrs={"rows": 4, "spellcheck": "false"})}

    def check_row(self, row: RemoteServer) -> None:
        model_rules.check_remote_server(row)


@admin.register(RemoteServer)
class RemoteServerAdmin(Admin[RemoteServer]):
    form = RemoteServerForm
    list_display = ("name", "kind", "address", "offered", "weight", "max_in_flight", "has_secret", "enabled")
    list_filter = ("kind", "enabled")
    search_fields = ("name", "address")
    fieldsets = (
        (None, {"fields": (("name", "enabled"), "kind", "address")}),
        ("Models", {"fields": ("models",)}),
        ("Load", {"fields": (("weight", "max_in_flight"),)}),
        ("Secret", {"fields": ("new_secret", "forget_secret")}),
    )

    @column("models")
    def offered(self, remote: RemoteServer) -> str:
        names = list(remote.models)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(names[:3]) + more or NOTHING

    @column("secret", boolean=True)
    def has_secret(self, remote: RemoteServer) -> bool:
        return bool(remote.secret)

    def save_model(self, request: HttpRequest, obj: RemoteServer, form: ModelForm[RemoteServer], change: bool) -> None:
        given: dict[str, Any] = form.cleaned_data
        if given.get("new_secret"):
            obj.secret = secret_box.seal(settings.SECRET_KEY, given["new_secret"])
        elif given.get("forget_secret"):
            obj.secret = ""
        super().save_model(request, obj, form, change)
