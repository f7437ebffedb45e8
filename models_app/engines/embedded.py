"""Adapter of the embedded engine: llama.cpp's real server from the xllamacpp wheel, in a process of its own."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import httpx

from models_app.engines import llama_http, llama_model
from models_app.engines.base import Command, EngineSettings, Launch, ModelSpec, Probe, Target
from models_app.engines.embedded_options import OPTIONS, as_attributes, check_options, check_template
from models_app.exceptions import MissingProgram

PACKAGE = "xllamacpp"
SPEC = "spec.json"
SERVER = Path(__file__).with_name("embedded_server.py")


class EmbeddedEngine:
    """See EngineAdapter."""

    name = "embedded"
    options = OPTIONS

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings

    def installed(self) -> str:
        """Without importing the library: it is large, and belongs into the engine's process alone."""
        try:
            return f"{PACKAGE} {metadata.version(PACKAGE)}"
        except metadata.PackageNotFoundError:
            raise MissingProgram(f"The Python package {PACKAGE} is missing; install requirements.txt again.") from None

    def preflight(self, model: ModelSpec) -> None:
        self.installed()
        check_options(model.extra_args)
        check_template(model.prompt_template)
        llama_model.check_files(model.extra_args)
        llama_model.served(model)

    def command(self, launch: Launch) -> Command:
        model = launch.model
        served = llama_model.served(model)
        spec = {
            "model_path": str(served.path),
            "embedding": served.embedding,
            "pooling": served.pooling,
            "model_alias": model.name,
            "port": launch.port,
            "api_key": launch.secret,
            "n_ctx": served.sizes.context,
            "n_parallel": model.slots,
            "n_batch": served.sizes.batch,
            "n_ubatch": served.sizes.micro_batch,
            "n_threads": model.threads,
            "n_gpu_layers": model.gpu_layers,
            "chat_template": "" if served.embedding else model.prompt_template,
            "options": as_attributes(served.extra_args),
        }
        # -I: neither the working directory nor PYTHON* variables nor this project's modules get onto its path.
        return Command(argv=[sys.executable, "-I", str(SERVER), str(launch.folder)], files={SPEC: json.dumps(spec)})

    def probe(self, target: Target, client: httpx.Client) -> Probe:
        return llama_http.probe(target, client)
