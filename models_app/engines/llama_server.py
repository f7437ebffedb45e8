"""Adapter of the engine llama-server: llama.cpp's own program on this node, with whatever GPUs it was built for."""

from __future__ import annotations

from typing import Any

import httpx

from models_app.engines import llama_http, llama_model, llama_server_binary, options
from models_app.engines.base import Command, EngineSettings, Launch, ModelSpec, Probe, Target
from models_app.engines.embedded_options import check_template
from models_app.engines.llama_model import Served
from models_app.engines.llama_server_binary import Binary
from models_app.engines.llama_server_options import OPTIONS, as_argv
from models_app.exceptions import PreflightError

KEY_FILE = "api-key"
ALL_LAYERS = "999"  # its own -1 means "as it sees fit"
CACHE_RAM_MIB = 256  # its own 8 GiB would not be counted by anybody

# Without these we cannot run it as we must: on loopback, with a key that no other process can read, on known sizes.
NEEDED = (
    "--host", "--port", "--model", "--alias", "--api-key-file", "--ctx-size", "--parallel", "--batch-size", "--ubatch-size",
    "--threads", "--n-gpu-layers", "--metrics", "--embedding", "--pooling", "--chat-template",
)  # fmt: skip


class LlamaServerEngine:
    """See EngineAdapter."""

    name = "llama-server"
    options = OPTIONS

    def __init__(self, settings: EngineSettings) -> None:
        self._program = settings.llama_server

    def installed(self) -> str:
        binary = self._binary()
        return f"{binary.path}, version {binary.version}"

    def preflight(self, model: ModelSpec) -> None:
        options.check(OPTIONS, model.extra_args)
        check_template(model.prompt_template)
        binary = self._binary()
        served = llama_model.served(model)
        as_argv(_with_defaults(binary, served.extra_args), binary)
        llama_model.check_files(model.extra_args)

    def command(self, launch: Launch) -> Command:
        model, binary = launch.model, self._binary()
        served = llama_model.served(model)
        argv = [str(binary.path), "--host", "127.0.0.1", "--port", str(launch.port)]
        argv += ["--model", str(served.path), "--alias", model.name]
        argv += ["--api-key-file", str(launch.folder / KEY_FILE)]
        argv += _sizes(model, served)
        argv += _template(binary, served, model.prompt_template)
        argv += _fixed(binary)
        argv += as_argv(_with_defaults(binary, served.extra_args), binary)
        return Command(argv=argv, files={KEY_FILE: launch.secret + "\n"})

    def probe(self, target: Target, client: httpx.Client) -> Probe:
        return llama_http.probe(target, client)

    def _binary(self) -> Binary:
        binary = llama_server_binary.inspect(self._program)
        missing = [flag for flag in NEEDED if binary.spelling(flag) is None]
        if missing:
            raise PreflightError(
                f"{binary.path} (version {binary.version}) is too old: it lacks {', '.join(missing)}; install a newer one."
            )
        return binary


def _sizes(model: ModelSpec, served: Served) -> list[str]:
    sizes = served.sizes
    argv = ["--ctx-size", str(sizes.context), "--parallel", str(model.slots), "--batch-size", str(sizes.batch)]
    if sizes.micro_batch is not None:
        argv += ["--ubatch-size", str(sizes.micro_batch)]
    if model.threads:
        argv += ["--threads", str(model.threads)]
    return [*argv, "--n-gpu-layers", ALL_LAYERS if model.gpu_layers < 0 else str(model.gpu_layers)]


def _template(binary: Binary, served: Served, name: str) -> list[str]:
    """For an embedding model its pooling, for a chat model its template. Of the built-in templates the Jinja renderer knows
    one alone; the others need the older renderer, which is asked for before they are named."""
    if served.embedding:
        return ["--embedding", *(["--pooling", served.pooling] if served.pooling else [])]
    jinja = binary.spelling("--jinja" if name in {"", "chatml"} else "--no-jinja")
    return [*([jinja] if jinja else []), *(["--chat-template", name] if name else [])]


def _fixed(binary: Binary) -> list[str]:
    """What is always so, as far as the binary knows of it: observable, quiet, off the network, sizes as they were asked for."""
    argv = ["--metrics"]
    for names in (("--slots",), ("--no-ui", "--no-webui"), ("--offline",), ("--log-timestamps",), ("--log-prefix",)):
        argv += filter(None, [binary.spelling(*names)])
    for flag, value in (("--log-colors", "off"), ("--fit", "off")):
        argv += [flag, value] if binary.spelling(flag) else []
    return argv


def _with_defaults(binary: Binary, extra_args: dict[str, Any]) -> dict[str, Any]:
    """extra_args over our own choices, which a binary that has no word for them does without."""
    own = {"cache_ram_mib": CACHE_RAM_MIB} if binary.spelling("--cache-ram") else {}
    return own | extra_args
