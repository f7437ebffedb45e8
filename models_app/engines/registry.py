"""Every engine by name. Adding one = an adapter file, a line here and its traits in models_app/contracts/traits.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from models_app.engines.base import EngineAdapter, EngineSettings
from models_app.engines.embedded import EmbeddedEngine
from models_app.engines.llama_server import LlamaServerEngine
from models_app.engines.options import Option
from models_app.engines.wasmedge import WasmEdgeEngine
from models_app.exceptions import PreflightError

ENGINES: dict[str, Callable[[EngineSettings], EngineAdapter]] = {
    "embedded": EmbeddedEngine,
    "llama-server": LlamaServerEngine,
    "wasmedge": WasmEdgeEngine,
}


def adapter(name: str, settings: EngineSettings) -> EngineAdapter:
    """The adapter of this engine; PreflightError where there is none."""
    try:
        return ENGINES[name](settings)
    except KeyError:
        raise PreflightError(f"There is no engine “{name}”; choose one of: {', '.join(sorted(ENGINES))}.") from None


def options_of(name: str) -> Mapping[str, Option]:
    """The engine's allow-list of extra_args, its attribute `options`; empty where it has none or there is no such engine."""
    found: Mapping[str, Option] = getattr(ENGINES.get(name), "options", {})
    return found
