"""Errors as JSON that names the field. One place translates what services raise."""

from __future__ import annotations

import logging
from typing import Any

from django.core.exceptions import NON_FIELD_ERRORS, ValidationError
from django.db import IntegrityError, OperationalError
from rest_framework import exceptions
from rest_framework.response import Response
from rest_framework.settings import api_settings
from rest_framework.views import exception_handler

from models_app.exceptions import AssistantError

log = logging.getLogger(__name__)


class Conflict(exceptions.APIException):
    """The request is fine, the present state does not allow it."""

    status_code = 409
    default_code = "conflict"


class Unavailable(exceptions.APIException):
    """Nothing is wrong with the request; the database cannot take it now."""

    status_code = 503
    default_code = "unavailable"


def handle(error: Exception, context: dict[str, Any]) -> Response | None:
    """DRF's handler, after our own errors and Django's ValidationError are given their status."""
    if isinstance(error, ValidationError):
        error = exceptions.ValidationError(by_field(error))
    elif isinstance(error, AssistantError):
        error = Conflict(str(error))
    elif isinstance(error, IntegrityError):
        error = Conflict("Another write came first and excludes this one; read the resource again.")
    elif isinstance(error, OperationalError):
        log.error("The database failed: %s", error)
        error = Unavailable("The database does not answer or is busy; nothing was changed, try again.")
    return exception_handler(error, context)


def by_field(error: ValidationError) -> dict[str, list[str]]:
    """{"field": ["sentence", …]}; what concerns no single field stands under non_field_errors."""
    if not hasattr(error, "error_dict"):
        return {api_settings.NON_FIELD_ERRORS_KEY: error.messages}
    general = api_settings.NON_FIELD_ERRORS_KEY
    return {general if field == NON_FIELD_ERRORS else field: messages for field, messages in error.message_dict.items()}
