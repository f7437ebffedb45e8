"""Which engines this node has, and what is missing for the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from models_app import engine_access
from models_app.doctor.finding import Context, Finding, fail, ok, warn
from models_app.engines import registry
from models_app.engines.base import Installable
from models_app.exceptions import PreflightError
from models_app.models import ModelConfig


def check(context: Context) -> Iterable[Finding]:
    used = set() if "database" in context.missing else set(ModelConfig.objects.enabled().values_list("engine", flat=True))
    for name in sorted(registry.ENGINES):
        yield check_engine(name, used)
    for name in sorted(used - registry.ENGINES.keys()):
        yield fail(f"A model wants the engine “{name}”, which does not exist.", "Choose another for it.")


def check_engine(name: str, used: Collection[str]) -> Finding:
    """used: engines of enabled models; one that nobody uses may be missing."""
    adapter = engine_access.adapter(name)
    if not isinstance(adapter, Installable):
        return ok(f"{name} cannot be looked at without a model.")
    try:
        return ok(f"{name}: {adapter.installed()}.")
    except PreflightError as error:
        if name in used:
            return fail(f"{name}: {error}")
        return warn(f"{name} is not ready, and no model uses it: {error}")
