"""Accounts and groups, with unfold's forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib import admin
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group, User
from django.db.models import Count, ManyToManyField, Q, QuerySet
from django.forms import ModelMultipleChoiceField
from django.http import HttpRequest
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm
from unfold.widgets import UnfoldAdminSelect2MultipleWidget

from models_app.admin.base import Admin, age, column

admin.site.unregister(User)
admin.site.unregister(Group)

if TYPE_CHECKING:

    class UserBase(DjangoUserAdmin[User]):
        """Django's."""

    class GroupBase(DjangoGroupAdmin):
        """Django's."""
else:

    class UserBase(DjangoUserAdmin, Admin):
        """Django's behaviour, unfold's look."""

    class GroupBase(DjangoGroupAdmin, Admin):
        """Django's behaviour, unfold's look."""


@admin.register(User)
class UserAdmin(UserBase):
    """Deactivating a user refuses their keys within a second. Only superusers hand out power."""

    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm
    list_display = ("username", "email", "state", "role", "usable_keys", "signed_in")
    list_filter = ("is_active", "is_staff", "is_superuser", "groups")
    filter_horizontal = ()
    POWERS: ClassVar = ("is_staff", "is_superuser", "groups", "user_permissions")

    def get_queryset(self, request: HttpRequest) -> QuerySet[User]:
        unrevoked = Count("api_keys", filter=Q(api_keys__revoked_at__isnull=True))
        users: QuerySet[User] = super().get_queryset(request)
        return users.annotate(key_count=unrevoked)

    def get_readonly_fields(self, request: HttpRequest, obj: User | None = None) -> Any:
        fields = tuple(super().get_readonly_fields(request, obj))
        return fields if request.user.is_superuser else (*fields, *self.POWERS)

    def has_change_permission(self, request: HttpRequest, obj: User | None = None) -> bool:
        """A superuser's account (their password above all) is for superusers."""
        return _may_touch(request, obj) and super().has_change_permission(request, obj)

    def has_delete_permission(self, request: HttpRequest, obj: User | None = None) -> bool:
        return _may_touch(request, obj) and super().has_delete_permission(request, obj)

    def formfield_for_manytomany(
        self, db_field: ManyToManyField[Any, Any], request: HttpRequest, **kwargs: Any
    ) -> ModelMultipleChoiceField[Any] | None:
        return _searchable(super().formfield_for_manytomany(db_field, request, **kwargs))

    @column("state", label={"active": "success", "deactivated": "danger"}, ordering="is_active")
    def state(self, user: User) -> str:
        return "active" if user.is_active else "deactivated"

    @column("role")
    def role(self, user: User) -> str:
        if user.is_superuser:
            return "administrator"
        return "staff" if user.is_staff else "user"

    @column("keys")
    def usable_keys(self, user: User) -> SafeString:
        return format_html('<a href="../../models_app/apikey/?user__id__exact={}">{}</a>', user.pk, getattr(user, "key_count", 0))

    @column("last signed in", ordering="last_login")
    def signed_in(self, user: User) -> SafeString | str:
        return age(user.last_login)


@admin.register(Group)
class GroupAdmin(GroupBase):
    filter_horizontal = ()

    def get_readonly_fields(self, request: HttpRequest, obj: Group | None = None) -> Any:
        return () if request.user.is_superuser else ("permissions",)

    def formfield_for_manytomany(
        self, db_field: ManyToManyField[Any, Any], request: HttpRequest | None = None, **kwargs: Any
    ) -> ModelMultipleChoiceField[Any] | None:
        return _searchable(super().formfield_for_manytomany(db_field, request, **kwargs))


def _searchable(field: ModelMultipleChoiceField[Any] | None) -> ModelMultipleChoiceField[Any] | None:
    """A widget that searches, in place of the two lists that overflow; Django's hint on plain lists goes."""
    if field is not None:
        field.widget = UnfoldAdminSelect2MultipleWidget()
        field.widget.choices = field.choices
        field.help_text = ""
    return field


def _may_touch(request: HttpRequest, obj: object) -> bool:
    return bool(request.user.is_superuser) or not (isinstance(obj, User) and obj.is_superuser)
