"""The embedded engine's process: llama.cpp's server out of the xllamacpp wheel. Run by path: embedded_server.py <folder>.

It imports neither Django nor anything of this project. <folder>/spec.json (0600, for it holds the API key) tells it
everything. TERM ends it at once, also while it generates: it keeps nothing that would have to be saved.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any, TypedDict

import xllamacpp

SPEC = "spec.json"
ALL_LAYERS = 999  # llama.cpp's own -1 means "as it sees fit"


class Spec(TypedDict):
    """spec.json."""

    model_path: str
    embedding: bool
    pooling: str  # for an embedding model; empty: as the model file says
    model_alias: str
    port: int
    api_key: str
    n_ctx: int  # tokens of all slots together
    n_parallel: int
    n_batch: int
    n_ubatch: int | None  # None: the library's own
    n_threads: int  # 0: the library chooses
    n_gpu_layers: int  # -1: all
    chat_template: str  # a built-in name, or empty for the one in the model file
    options: dict[str, Any]  # embedded_options.as_attributes()


def parameters(spec: Spec) -> Any:
    """CommonParams of this spec."""
    params = xllamacpp.CommonParams()
    params.model.path = spec["model_path"]
    params.model_alias = {spec["model_alias"]}
    params.hostnames = ["127.0.0.1"]
    params.port = spec["port"]
    params.api_keys = [spec["api_key"]]
    params.n_ctx = spec["n_ctx"]
    params.n_parallel = spec["n_parallel"]
    params.n_batch = spec["n_batch"]
    if spec["n_ubatch"] is not None:
        params.n_ubatch = spec["n_ubatch"]
    params.embedding = spec["embedding"]
    if spec["pooling"]:
        params.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{spec['pooling'].upper()}")
    params.n_gpu_layers = ALL_LAYERS if spec["n_gpu_layers"] < 0 else spec["n_gpu_layers"]
    if spec["n_threads"]:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = spec["n_threads"]
    params.chat_template = spec["chat_template"]
    # As Jinja source llama.cpp knows one name alone; the other built-in templates need its older renderer.
    params.use_jinja = spec["chat_template"] in {"", "chatml"}
    params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = True
    params.fit_params = False  # what was asked for, or a failure that says why
    params.cache_ram_mib = 256  # the library's 8 GiB would not be counted by anybody
    params.offline = True
    params.ui = False
    for name, value in spec["options"].items():
        set_option(params, name, value)
    return params


def set_option(params: Any, name: str, value: Any) -> None:
    """Set one checked option by its attribute path."""
    *groups, attribute = name.split(".")
    for group in groups:
        params = getattr(params, group)
    setattr(params, attribute, made(value))


def made(value: Any) -> Any:
    """A value out of the spec file; see embedded_options.as_attributes()."""
    if isinstance(value, list):
        return [made(one) for one in value]
    if isinstance(value, dict) and "enum" in value:
        return getattr(getattr(xllamacpp, value["enum"]), value["member"])
    if isinstance(value, dict) and "class" in value:
        return getattr(xllamacpp, value["class"])(*map(made, value["arguments"]))
    return value


def say(text: str) -> None:
    """A line of our own between those of llama.cpp, with the level where theirs have it."""
    sys.stdout.write(f"I embedded_server: {text}\n")
    sys.stdout.flush()


def announcement(spec: Spec) -> str:
    """What is about to be loaded, and how big."""
    kind = f"embedding model (pooling {spec['pooling'] or 'as in its file'})" if spec["embedding"] else "chat model"
    slots, layers = spec["n_parallel"], spec["n_gpu_layers"]
    return (
        f"loading {spec['model_path']} as {kind} “{spec['model_alias']}”: {slots} × {spec['n_ctx'] // slots} tokens of context, "
        f"batch {spec['n_batch']}, threads {spec['n_threads'] or 'automatic'}, GPU layers {'all' if layers < 0 else layers}"
    )


def main(folder: str) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    spec: Spec = json.loads((Path(folder) / SPEC).read_text())
    say(announcement(spec))
    try:
        server = xllamacpp.Server(parameters(spec))
    except RuntimeError:  # its text is the same for every cause; llama.cpp's own last lines, just printed, tell which
        return 1
    say(f"“{spec['model_alias']}” serves on {server.listening_address}")
    while True:  # the server lives in threads of its own as long as the object does
        signal.pause()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
