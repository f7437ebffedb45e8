"""What every admin page here shares: typed faces of unfold, actions behind a dialog, and how things are written.

Actions of unfold without a dialog are plain links, a state change by GET. So `confirmed` is the only way to make one here.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from django import forms
from django.contrib import messages
from django.core.exceptions import ValidationError
from django.db.models import Model
from django.forms.models import construct_instance
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.utils import timezone
from django.utils.functional import SimpleLazyObject
from django.utils.html import format_html
from django.utils.http import url_has_allowed_host_and_scheme
from django.utils.safestring import SafeString
from django.utils.timesince import timesince
from unfold.decorators import action, display
from unfold.enums import ActionVariant

if TYPE_CHECKING:
    from django.contrib.admin import ModelAdmin as UnfoldModelAdmin
    from django.forms import ModelForm
else:
    from unfold.admin import ModelAdmin as _UnfoldModelAdmin

    class Subscriptable:
        """Lets a class be written as the type stubs say: Admin[Model]."""

        def __class_getitem__(cls, _model: object) -> type:
            return cls

    class UnfoldModelAdmin(Subscriptable, _UnfoldModelAdmin):
        """unfold's."""

    class ModelForm(Subscriptable, forms.ModelForm):
        """Django's."""


M = TypeVar("M", bound=Model)
F = TypeVar("F", bound=Callable[..., Any])

NOTHING = "—"
GIB = 1 << 30


class Admin(UnfoldModelAdmin[M], Generic[M]):
    """Base of all pages: nothing is lost by leaving a form, and a row can be asked for by its id."""

    warn_unsaved_form = True
    list_per_page = 100

    def row(self, request: HttpRequest, object_id: Any) -> M:
        """The row an action is about. Raises Http404."""
        found = self.get_object(request, str(object_id))
        if found is None:
            raise Http404(f"There is no {self.opts.verbose_name} {object_id} any more.")
        return found


class RuleForm(ModelForm[M], Generic[M]):
    """A form that asks the services' rules, with their errors beside the fields."""

    def clean(self) -> dict[str, Any] | None:
        cleaned = super().clean()
        row = construct_instance(self, copy.copy(self.instance))
        try:
            self.check_row(row)
        except ValidationError as error:
            for field, messages_ in error.message_dict.items():
                if field in self.errors:
                    continue  # the field itself has been refused already
                self.add_error(field if field in self.fields else None, messages_)
        return cleaned

    def check_row(self, row: Any) -> None:
        """Raise ValidationError with a dict by field name."""


def confirmed(
    title: str, question: str, *, icon: str, permission: str = "change", dangerous: bool = False, submit: str = ""
) -> Callable[[F], F]:
    """An action (row or detail) that asks first, naming its row, and runs on POST only: method(self, request, form, object_id).

    dangerous: the button that does it is red, as the one that asks.
    """

    def asking(method: F, heading: object) -> F:
        dialog = {"title": heading, "description": question, "form_submit_text": submit or title, "dangerous": dangerous}
        variant = ActionVariant.DANGER if dangerous else ActionVariant.DEFAULT
        made: F = action(method, description=title, icon=icon, permissions=[permission], variant=variant, dialog=dialog)
        return made

    def decorate(method: F) -> F:
        @functools.wraps(asking(method, title))
        def named(page: Admin[Any], request: HttpRequest, object_id: Any) -> HttpResponse:
            # Not looked up before the dialog is drawn: who may not do this does not learn what there is.
            heading = SimpleLazyObject(lambda: f"{title} {page.row(request, object_id)}?")
            answer: HttpResponse = asking(method, heading)(page, request, object_id=object_id)
            return answer

        return named  # type: ignore[return-value]  # it takes what the method takes, but for the form

    return decorate


def column(title: str, **options: Any) -> Callable[[F], F]:
    """A computed column."""
    decorate: Callable[[F], F] = display(description=title, **options)
    return decorate


def done(request: HttpRequest, message: str, *, fallback: str, level: int = messages.SUCCESS) -> HttpResponse:
    """End of an action: say what happened on the page it was started from."""
    messages.add_message(request, level, message)
    came_from = request.headers.get("HX-Current-URL") or ""
    if not url_has_allowed_host_and_scheme(came_from, {request.get_host()}, require_https=request.is_secure()):
        came_from = fallback
    if request.headers.get("HX-Request"):
        return HttpResponse(headers={"HX-Redirect": came_from})
    return HttpResponseRedirect(came_from)


def age(when: datetime | None) -> SafeString | str:
    """“3 minutes ago”, the exact time on hover."""
    if when is None:
        return NOTHING
    now = timezone.now()
    seconds = (now - when).total_seconds()
    if abs(seconds) < 60:
        words = f"{abs(seconds):.0f} s"
    else:
        words = timesince(when, now, depth=1) if seconds > 0 else timesince(now, when, depth=1)
    words = f"{words} ago" if seconds >= 0 else f"in {words}"
    exact = timezone.localtime(when)
    return format_html(
        '<time datetime="{}" title="{}">{}</time>', exact.isoformat(), exact.strftime("%Y-%m-%d %H:%M:%S %Z"), words
    )


def size(count: int | None) -> str:
    """Bytes for people."""
    if count is None:
        return NOTHING
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / (1 << 20):.0f} MiB"


def base_url(request: HttpRequest) -> str:
    """Where clients of /v1 connect, as this browser reached us."""
    return request.build_absolute_uri("/v1")
