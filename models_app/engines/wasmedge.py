"""Adapter of the wasmedge engine: llama-api-server (LlamaEdge) in a WasmEdge sandbox, inference by its wasi_nn-ggml plugin.

One request at a time per process: HTTP and inference share one thread. It has no key of its own that would keep others out
(it checks one only where a client sends one), so that its port's owner is what proves it.
"""

from __future__ import annotations

import contextlib
import shutil
from typing import Any

import httpx

from models_app.engines import gguf, wasmedge_launch, wasmedge_options, wasmedge_runtime
from models_app.engines.base import Command, EngineSettings, Health, Launch, ModelSpec, Probe, Target
from models_app.exceptions import PreflightError


class WasmEdgeEngine:
    """See EngineAdapter."""

    name = "wasmedge"
    options = wasmedge_options.OPTIONS

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings

    def installed(self) -> str:
        """See Installable."""
        return wasmedge_runtime.check(self._settings)

    def preflight(self, model: ModelSpec) -> None:
        wasmedge_options.check_options(model.extra_args)
        if model.chat_model_path is not None:
            wasmedge_options.check_template(model.prompt_template)
        if model.tts_model_path is not None and "codec_model_path" not in model.extra_args:
            raise PreflightError(
                "Speech needs a second model file for its sound; name it in extra_args as “codec_model_path” (for OuteTTS: "
                "wavtokenizer)."
            )
        for path in wasmedge_launch.models_of(model).values():
            if ":" in str(path):
                raise PreflightError(f"{path} has a colon in its path, which WasmEdge takes for a separator; rename it.")
            gguf.check(path)
        wasmedge_runtime.check(self._settings)

    def command(self, launch: Launch) -> Command:
        model = launch.model
        trained = _trained_ctx(model)
        arguments = wasmedge_launch.arguments(model, launch.port, launch.folder, self._settings.wasm_file, trained)
        files = {}
        if model.tts_model_path is not None:
            files[wasmedge_launch.CONFIG] = wasmedge_launch.config_file(model, launch.port, trained)
        program = shutil.which(self._settings.wasmedge) or self._settings.wasmedge
        return Command(argv=[program, *arguments], env={"LLAMA_LOG": wasmedge_launch.LOG_LEVEL}, files=files)

    def probe(self, target: Target, client: httpx.Client) -> Probe:
        """/v1/info names what is loaded. It listens only after the load, and answers nothing while it computes."""
        try:
            answer = client.get(f"http://{target.host}:{target.port}/v1/info")
        except httpx.TimeoutException:
            return Probe(Health.BUSY, "did not answer in time")
        except (httpx.ConnectError, httpx.ReadError):
            return Probe(Health.UNREACHABLE, "refuses connections")
        except httpx.HTTPError as error:
            return Probe(Health.WRONG_SERVER, f"does not speak HTTP as expected ({type(error).__name__})")
        if answer.status_code != httpx.codes.OK:
            return Probe(Health.WRONG_SERVER, f"/v1/info answered {answer.status_code}")
        names = _loaded_names(answer)
        if target.model_name not in names:
            said = f"serves {', '.join(sorted(names))}" if names else "did not say which model it serves"
            return Probe(Health.WRONG_SERVER, f"{said}, not {target.model_name}")
        return Probe(Health.READY)


def _trained_ctx(model: ModelSpec) -> int | None:
    """The longest context the embedding model was made for; None where its file does not tell."""
    if model.embedding_model_path is not None:
        with contextlib.suppress(PreflightError):
            return gguf.read_header(model.embedding_model_path).context_length or None
    return None


def _loaded_names(answer: httpx.Response) -> set[str]:
    try:
        info: Any = answer.json()
    except ValueError:
        return set()
    if not isinstance(info, dict):
        return set()
    models = (info.get(key) for key in ("chat_model", "embedding_model", "tts_model"))
    return {str(model["name"]) for model in models if isinstance(model, dict) and "name" in model}
