"""Other names of models."""

from __future__ import annotations

from typing import ClassVar

from django.contrib import admin

from models_app import model_rules
from models_app.admin.base import Admin, RuleForm
from models_app.models import ModelAlias


class ModelAliasForm(RuleForm[ModelAlias]):
    class Meta:
        model = ModelAlias
        fields: ClassVar = ["name", "model"]
        help_texts: ClassVar = {"name": "Clients may put this in “model” too, such as gpt-4o-mini."}

    def check_row(self, row: ModelAlias) -> None:
        model_rules.check_alias(row)


@admin.register(ModelAlias)
class ModelAliasAdmin(Admin[ModelAlias]):
    form = ModelAliasForm
    list_display = ("name", "model")
    list_select_related = ("model",)
    search_fields = ("name", "model__name")
    autocomplete_fields = ("model",)
