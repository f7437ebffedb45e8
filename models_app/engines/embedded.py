"""Adapter of the embedded engine: llama.cpp's real server from the xllamacpp wheel, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import httpx

from models_app.engines import gguf
from models_app.engines.base import Command, EngineSettings, Health, Launch, ModelSpec, Probe, Target
from models_app.engines.embedded_options import as_attributes, check_options, check_template
from models_app.exceptions import PreflightError

SPEC = "spec.json"
SERVER = Path(__file__).with_name("embedded_server.py")


class EmbeddedEngine:
    """See EngineAdapter."""

    name = "embedded"

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings

    def preflight(self, model: ModelSpec) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise PreflightError("The Python package xllamacpp is missing; install requirements.txt again.")
        if model.embedding_model_path or model.tts_model_path:
            raise PreflightError(
                "The embedded engine serves chat models alone; leave embedding_model_path and tts_model_path empty."
            )
        if model.chat_model_path is None:
            raise PreflightError("The embedded engine needs chat_model_path.")
        check_template(model.prompt_template)
        check_options(model.extra_args)
        gguf.check(model.chat_model_path)

    def command(self, launch: Launch) -> Command:
        model = launch.model
        spec = {
            "model_path": str(model.chat_model_path),
            "model_alias": model.name,
            "port": launch.port,
            "api_key": launch.secret,
            "n_ctx": model.ctx_size * model.slots,
            "n_parallel": model.slots,
            "n_batch": model.batch_size,
            "n_threads": model.threads,
            "n_gpu_layers": model.gpu_layers,
            "chat_template": model.prompt_template,
            "options": as_attributes(model.extra_args),
        }
        # -I: neither the working directory nor PYTHON* variables nor this project's modules get onto its path.
        return Command(argv=[sys.executable, "-I", str(SERVER), str(launch.folder)], files={SPEC: json.dumps(spec)})

    def probe(self, target: Target, client: httpx.Client) -> Probe:
        """/slots: 200 with our key and 401 without it proves that the answer comes from the process we launched."""
        address = f"http://{target.host}:{target.port}/slots"
        try:
            keyed = client.get(address, headers={"Authorization": f"Bearer {target.secret}"})
            if keyed.status_code == httpx.codes.SERVICE_UNAVAILABLE:
                return Probe(Health.LOADING)
            if target.proven and keyed.status_code == httpx.codes.OK:
                return _ready(keyed)  # the engine logs a warning for every request without a key
            bare = client.get(address)
        except httpx.ConnectError:
            return Probe(Health.UNREACHABLE, "refuses connections")
        except httpx.TimeoutException:
            return Probe(Health.BUSY, "did not answer in time")
        except httpx.HTTPError as error:
            return Probe(Health.WRONG_SERVER, f"does not speak HTTP as expected ({type(error).__name__})")
        if keyed.status_code != httpx.codes.OK or bare.status_code != httpx.codes.UNAUTHORIZED:
            return Probe(Health.WRONG_SERVER, f"/slots answered {keyed.status_code} with our key, {bare.status_code} without")
        return _ready(keyed)


def _ready(answer: httpx.Response) -> Probe:
    try:
        slots = answer.json()
        return Probe(Health.READY, slots_busy=sum(bool(slot["is_processing"]) for slot in slots))
    except (ValueError, TypeError, KeyError):
        return Probe(Health.WRONG_SERVER, "/slots did not answer a list of slots")
