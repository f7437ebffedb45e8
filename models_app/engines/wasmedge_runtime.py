"""What the wasmedge engine needs of this node: WasmEdge, its ggml plugin, and the pinned llama-api-server.wasm."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path

from models_app.engines import programs
from models_app.engines.base import EngineSettings
from models_app.engines.programs import Answer
from models_app.exceptions import MissingLibrary, MissingPlugin, MissingProgram, PreflightError, UnknownImport

Version = tuple[int, ...]
MIN_VERSION: Version = (0, 14, 1)
MIN_SERVER: Version = (0, 16, 9)  # the first with a config file, without which there is no speech
PLUGIN = "wasi_nn"

_VERSION = re.compile(r"wasmedge version (?P<version>\d+\.\d+\.\d+)")
_PLUGIN = re.compile(rf'\(plugin "{PLUGIN}"\)')
_LIBRARY = re.compile(r"load library failed:\s*(?P<name>\S+?): cannot open shared object file")
_LINKER = re.compile(r"error while loading shared libraries: (?P<name>[^:\s]+)")
_IMPORT = re.compile(r'unknown import.*?linking module: "(?P<module>[^"]*)" ?, function name: "(?P<function>[^"]*)"', re.DOTALL)
_SERVER = re.compile(r"(?:llama-api-server|LlamaEdge API Server) (?P<version>\d+\.\d+\.\d+)", re.IGNORECASE)
_SHA256 = re.compile(r"[0-9a-f]{64}")

INSTALL = "install WasmEdge with its wasi_nn-ggml plugin (see “Engines” in docs/operations.md)"
HOW_TO_PIN = "set it to the SHA-256 that the release's SHA256SUM file gives for llama-api-server.wasm"


def check(settings: EngineSettings) -> str:
    """What would run here, by name and version. Raises PreflightError for the first thing that is missing."""
    program = programs.find(settings.wasmedge, "ASSISTANT_WASMEDGE", INSTALL)
    about = programs.ask([str(program), "--version"])
    version = _check_runtime(program, about)
    check_wasm(settings)
    wasm = settings.wasm_file.stat()
    # Runtime, plugins and file as they are now: what was found out about others does not hold.
    facts = (about.text, program.stat().st_mtime_ns, wasm.st_size, wasm.st_mtime_ns)
    return f"WasmEdge {_dotted(version)}, llama-api-server {_dotted(_server_version(program, settings.wasm_file, facts))}"


def _check_runtime(program: Path, about: Answer) -> Version:
    if missing := _LINKER.search(about.text):
        raise MissingLibrary(f"{program} needs the library {missing['name']}, which is missing; install the package that has it.")
    found = _VERSION.search(about.text)
    if found is None:
        raise MissingProgram(f"{program} is not WasmEdge (asked for its version it said: {about.last_line}); {INSTALL}.")
    version = _numbers(found["version"])
    if version < MIN_VERSION:
        raise MissingProgram(f"WasmEdge {_dotted(version)} is too old; install {_dotted(MIN_VERSION)} or newer.")
    if not _PLUGIN.search(about.text):
        raise MissingPlugin(_why_no_plugin(about.text))
    return version


def _why_no_plugin(text: str) -> str:
    if found := _LIBRARY.search(text):
        return (
            f"WasmEdge cannot load its wasi_nn-ggml plugin because the library {found['name']} is missing; install the package "
            "that has it, or the plugin build for this machine."
        )
    return (
        "WasmEdge has no wasi_nn-ggml plugin, without which it serves no model (“unknown option: nn-preload”); install the one "
        "of its version, or name its folder in WASMEDGE_PLUGIN_PATH."
    )


def check_pin(sha256: str) -> None:
    """Raise PreflightError unless a checksum is pinned."""
    if not sha256:
        raise PreflightError(f"ASSISTANT_WASM_SHA256 is empty, and nothing unpinned is run: {HOW_TO_PIN}.")
    if not _SHA256.fullmatch(sha256):
        raise PreflightError(f"ASSISTANT_WASM_SHA256 is not 64 lower-case hexadecimal digits: {HOW_TO_PIN}.")


def check_wasm(settings: EngineSettings) -> None:
    """Raise PreflightError unless the wasm file is there and is the pinned one. A file is hashed once, not at every start."""
    check_pin(settings.wasm_sha256)
    file = settings.wasm_file
    try:
        facts = file.stat()
        digest = _digest(file, facts.st_size, facts.st_mtime_ns)
    except FileNotFoundError:
        raise PreflightError(f"{file} is missing; run manage.py fetch_engine, or name the file in ASSISTANT_WASM_FILE.") from None
    except OSError as error:
        raise PreflightError(f"{file} cannot be read ({error.strerror}); mend its permissions.") from error
    if digest != settings.wasm_sha256:
        raise PreflightError(
            f"{file} is not the pinned file (its SHA-256 is {digest}); remove it and run manage.py fetch_engine, or correct "
            "ASSISTANT_WASM_SHA256."
        )


@lru_cache(maxsize=8)
def _digest(file: Path, size: int, mtime_ns: int) -> str:
    """size and mtime_ns tell a changed file from the one that was hashed."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@lru_cache(maxsize=8)
def _server_version(program: Path, wasm: Path, facts: tuple[str | int, ...]) -> Version:
    """Let the wasm file print its version, which links it to runtime and plugin without loading a model.

    Asked once for the same facts; a failure is asked about again.
    """
    answer = programs.ask([str(program), str(wasm), "-V"])
    found = _SERVER.search(answer.text)
    if answer.code == 0 and found is not None:
        version = _numbers(found["version"])
        if version < MIN_SERVER:
            raise PreflightError(f"llama-api-server {_dotted(version)} is too old; pin {_dotted(MIN_SERVER)} or newer.")
        return version
    if missing := _IMPORT.search(answer.text):
        raise UnknownImport(
            f"{wasm.name} does not fit this WasmEdge: it asks for {missing['module']}.{missing['function']} (“unknown import”); "
            "install the newest WasmEdge and plugin, or pin another version of the file."
        )
    raise PreflightError(f"{wasm} does not run as llama-api-server (it said: {answer.last_line}); fetch the file anew.")


def _numbers(text: str) -> Version:
    return tuple(map(int, text.split(".")))


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
