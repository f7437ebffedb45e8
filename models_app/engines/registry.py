"""Every engine by name. Adding one = an adapter file, a line here and its traits in models_app/contracts/traits.py."""

from __future__ import annotations

from collections.abc import Callable

from models_app.engines.base import EngineAdapter, EngineSettings
from models_app.engines.embedded import EmbeddedEngine
from models_app.exceptions import PreflightError

ENGINES: dict[str, Callable[[EngineSettings], EngineAdapter]] = {"embedded": EmbeddedEngine}


def adapter(name: str, settings: EngineSettings) -> EngineAdapter:
    """The adapter of this engine; PreflightError where there is none."""
    try:
        return ENGINES[name](settings)
    except KeyError:
        raise PreflightError(f"There is no engine “{name}”; choose one of: {', '.join(sorted(ENGINES))}.") from None
