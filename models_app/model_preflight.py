"""Everything asked of a model before it is saved: our own rules, then the engine's preflight; errors stand in the form."""

from __future__ import annotations

from collections.abc import Collection

from django.core.exceptions import NON_FIELD_ERRORS, ValidationError

from models_app import engine_access, launch_spec, model_rules
from models_app.engines import options, registry
from models_app.exceptions import PathNotAllowed, PreflightError
from models_app.models import ModelConfig


def check_model(model: ModelConfig, changed: Collection[str]) -> None:
    """Raise ValidationError with a dict by field name. Only what a change of these fields can break is looked at."""
    model_rules.check_model(model, changed)
    if not {"one_process", *launch_spec.LAUNCH_FIELDS}.intersection(changed):
        return
    if "extra_args" in changed:
        _check_files_of_extra_args(model)
    try:
        specs = [launch_spec.model_spec(model, part) for part in model.parts]
    except PathNotAllowed:
        return  # an unchanged path; its file may be on another node, or be gone, which the instance will say
    try:
        adapter = engine_access.adapter(model.engine)
        for spec in specs:
            adapter.preflight(spec)
    except PreflightError as error:
        raise ValidationError({_field(model, str(error)): str(error)}) from None


def _check_files_of_extra_args(model: ModelConfig) -> None:
    """A file that is named anew must be where model files may be, like those of the path fields."""
    try:
        options.resolved(registry.options_of(model.engine), model.extra_args, model_rules.resolve_model_path)
    except PathNotAllowed as error:
        raise ValidationError({"extra_args": str(error)}) from None


def _field(model: ModelConfig, message: str) -> str:
    """The setting a preflight message is about: the first it names, by name or by its path."""
    words = [(field, field) for field in launch_spec.LAUNCH_FIELDS if "_" in field]  # “name” or “port” may be just words
    paths = [(field, getattr(model, field)) for field in model_rules.PATH_FIELDS]
    words += [(field, str(model_rules.resolve_model_path(path))) for field, path in paths if path]
    named = [(message.find(word), field) for field, word in words if word in message]
    return min(named, default=(0, NON_FIELD_ERRORS))[1]
