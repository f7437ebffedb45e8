"""What engines say when they end, and what it means: an ordered table of patterns. Pure.

The messages are those of llama.cpp (embedded and llama-server), of WasmEdge with its ggml plugin, of llama-api-server, of
the dynamic linker and of our exec helper. The first rule that is found anywhere in the lines wins, so causes stand before
their consequences.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from models_app.contracts.diagnoses import Code

TITLES: dict[Code, str] = {
    Code.OUT_OF_MEMORY: "Out of memory",
    Code.NOT_A_MODEL: "Not a model file",
    Code.TRUNCATED_MODEL: "Model file cut short or damaged",
    Code.UNSUPPORTED_MODEL: "Model not supported by this engine",
    Code.MISSING_FILE: "File missing",
    Code.BAD_TEMPLATE: "Prompt template not usable",
    Code.UNKNOWN_OPTION: "Option unknown to the engine",
    Code.BAD_OPTION: "Option with a wrong value",
    Code.COUNTS_APART: "Model settings of unequal number",
    Code.MISSING_PLUGIN: "WasmEdge plugin missing",
    Code.MISSING_LIBRARY: "Library missing",
    Code.MISSING_PROGRAM: "Engine program missing",
    Code.UNKNOWN_IMPORT: "WasmEdge and wasm file do not fit",
    Code.BAD_WASM: "Not a wasm file",
    Code.NO_GPU: "GPU not usable",
    Code.PORT_TAKEN: "Port taken",
    Code.KILLED: "Killed from outside",
    Code.CRASHED: "Crashed",
    Code.START_TIMEOUT: "Not ready in time",
    Code.WRONG_SERVER: "Another program on its port",
    Code.WEDGED: "Stopped answering",
    Code.NOT_STARTED: "Could not be started",
    Code.PREFLIGHT: "Cannot start here",
    Code.MEMORY: "Does not fit into memory",
    Code.NODE_RESTARTED: "Machine restarted",
    Code.STOPPED: "Stopped",
    Code.UNKNOWN: "Ended for an unknown reason",
}


@dataclass(frozen=True, slots=True)
class Rule:
    """what may name the pattern's groups, and {port} and {path} of the case."""

    code: Code
    pattern: re.Pattern[str]
    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that was found, with its sentences filled in."""

    code: Code
    what: str
    remedy: str


def _rule(code: Code, pattern: str, what: str, remedy: str) -> Rule:
    return Rule(code, re.compile(pattern, re.MULTILINE | re.IGNORECASE), what, remedy)


_LIBRARY = "Install the package that carries it, or name its folder in LD_LIBRARY_PATH before starting Assistant."
_EXTRA = "Remove it from the model's extra_args, or install the engine version that knows it."
_AGAIN = "Download the file again and compare its size and checksum with the source's."
_GPU = r"CUDA(?!_Host)\w*|ROCm(?!_Host)\w*|HIP\w*|Vulkan(?!_Host)\w*|SYCL\w*|Metal|GPU"
_PART = r"key-value pairs|header|magic|tensor info|tensor data|the tensor|key"

_INSTALLATION = (
    _rule(
        Code.MISSING_PLUGIN,
        r"unknown option: (?:--)?nn-preload",
        "WasmEdge could not load its wasi_nn-ggml plugin: it is not installed, or a library it needs (CUDA, BLAS) is missing.",
        "Install the plugin built for this WasmEdge version, or set WASMEDGE_PLUGIN_PATH to its folder.",
    ),
    _rule(
        Code.UNKNOWN_IMPORT,
        r"unknown import.*\n.*linking module: \"(?P<module>[^\"]+)\"(?: , function name: \"(?P<function>[^\"]+)\")?",
        "This WasmEdge does not offer what llama-api-server.wasm asks for ({module}: {function}).",
        "Install the WasmEdge and plugin versions that the wasm file was made for, or fetch the pinned wasm file again.",
    ),
    _rule(
        Code.UNKNOWN_IMPORT,
        r"unknown import",
        "This WasmEdge does not offer what llama-api-server.wasm asks for.",
        "Install the WasmEdge and plugin versions that the wasm file was made for, or fetch the pinned wasm file again.",
    ),
    _rule(
        Code.BAD_WASM,
        r"loading failed: (?P<why>magic header not detected|[^,\n]+), Code",
        "WasmEdge cannot read the wasm file ({why}).",
        "Fetch llama-api-server.wasm again at its pinned version.",
    ),
    _rule(
        Code.MISSING_LIBRARY,
        r"error while loading shared libraries: (?P<library>[^:\s]+)",
        "The engine needs the library {library}, which was not found.",
        _LIBRARY,
    ),
    _rule(
        Code.MISSING_LIBRARY,
        r"(?P<library>\S+\.so[.\d]*): cannot open shared object file",
        "The engine needs the library {library}, which was not found.",
        _LIBRARY,
    ),
    _rule(
        Code.MISSING_LIBRARY,
        r"version [`'](?P<library>[A-Z]+_[\d.]+)' not found",
        "The engine was built for a newer system library than this machine has ({library}).",
        "Install a build of the engine made for this distribution.",
    ),
    _rule(
        Code.MISSING_LIBRARY,
        r"(?:ModuleNotFoundError|ImportError): No module named '(?P<library>[^']+)'",
        "The Python package {library} is missing.",
        "Install requirements.txt again in the environment that runs Assistant.",
    ),
    _rule(
        Code.MISSING_PROGRAM,
        r"^cannot start (?P<program>.+): (?P<why>[^:\n]+)$",
        "The engine's program {program} cannot be run ({why}).",
        "Install the engine, or give the right path in its setting.",
    ),
)

_OPTIONS = (
    _rule(
        Code.UNKNOWN_OPTION,
        r"(?:unknown option:|error: (?:invalid|unknown|unrecognized) argument:?|unrecognized (?:option|arguments?):?|"
        r"error: unexpected argument) ['\"]?(?P<option>[^'\"\s]+)",
        "The engine does not know the option {option}.",
        _EXTRA,
    ),
    _rule(
        Code.BAD_OPTION,
        r"error while handling argument \"(?P<option>[^\"]+)\": (?P<why>.+)$",
        "The engine refuses the value of its option {option}: {why}.",
        "Correct the setting it comes from.",
    ),
    _rule(
        Code.BAD_TEMPLATE,
        r"invalid value '(?P<value>[^']*)' for '--prompt-template",
        "The engine knows no prompt template “{value}”.",
        "Choose one of its templates in prompt_template.",
    ),
    _rule(
        Code.BAD_OPTION,
        r"error: invalid value '(?P<value>[^']*)' for '(?P<option>-[^' ]+)",
        "The engine refuses the value “{value}” of its option {option}.",
        "Correct the setting it comes from.",
    ),
    _rule(
        Code.COUNTS_APART,
        r"number of model names and (?P<list>[a-z ]+?) must be the same",
        "The engine was given another number of {list} than of models.",
        "Give one value for each model file, or serve the model's parts in processes of their own.",
    ),
    _rule(
        Code.BAD_TEMPLATE,
        r"chat template is not supported|unknown chat template|failed to parse chat template|unknown prompt template|"
        r"unsupported prompt template",
        "The engine cannot use this prompt template.",
        "Choose another prompt_template, or leave it empty to use the one in the model file.",
    ),
    _rule(
        Code.PORT_TAKEN,
        r"couldn't bind|failed to bind|address (?:already )?in use",
        "Port {port} was taken by another program before the engine could listen on it.",
        "Stop that program, or give the model another port or none.",
    ),
)

OUT_OF_MEMORY = (
    _rule(
        Code.OUT_OF_MEMORY,
        rf"cudaMalloc failed|(?:CUDA|HIP|ROCm) error: out of memory|OutOfDeviceMemory|"
        rf"(?:failed|unable) to allocate (?:{_GPU}) buffer",
        "The GPU's memory is too small for what was asked of it{amount}.",
        "Lower gpu_layers, ctx_size or slots, or choose a smaller model.",
    ),
    _rule(
        Code.OUT_OF_MEMORY,
        r"failed to allocate buffer for kv cache|failed to allocate compute|"
        r"failed to initialize the context: .*alloc",
        "There was not enough memory for the context{amount}.",
        "Lower ctx_size or slots, or free memory on this node.",
    ),
    _rule(
        Code.OUT_OF_MEMORY,
        r"bad_alloc|insufficient memory|cannot allocate memory|out of memory|MemoryError|"
        r"(?:failed|unable) to allocate(?!.*(?:pinned|_Host))",
        "There was not enough memory{amount}.",
        "Lower ctx_size or slots, choose a smaller model, or free memory on this node.",
    ),
)

_MODEL = (
    _rule(
        Code.MISSING_FILE,
        r"failed to open GGUF file '(?P<path_said>[^']+)' \((?P<why>[^)]+)\)",
        "The model file {path_said} cannot be opened ({why}).",
        "Put the file back or mend its permissions, or choose another.",
    ),
    _rule(
        Code.UNSUPPORTED_MODEL,
        r"unknown model architecture: '(?P<kind>[^']+)'",
        "This engine version does not know the model's architecture “{kind}”.",
        "Update the engine, or choose a model it supports.",
    ),
    _rule(
        Code.UNSUPPORTED_MODEL,
        r"(?P<kind>unknown (?:pre-)?tokenizer.*|unsupported (?:gguf|model|quantization).*|wrong number of tensors.*|"
        r"missing tensor '.*|tensor '.*' has (?:wrong shape|invalid (?:ggml )?type).*)$",
        "This engine version cannot read the model: {kind}.",
        "Update the engine, or choose a model it supports.",
    ),
    _rule(
        Code.NOT_A_MODEL,
        r"invalid magic(?: characters)?:? *'?(?P<magic>[^',\n]{0,8})",
        "The model file {path} is not in GGUF format (it begins with “{magic}”).",
        "Choose a GGUF file, or download it again: a saved web page or error answer looks like this.",
    ),
    _rule(
        Code.TRUNCATED_MODEL,
        rf"not within the file bounds|unexpectedly reached end of file|corrupted or incomplete|has invalid GGUF type|"
        rf"gguf_init\w*: failed to read (?:{_PART})",
        "The model file {path} is cut short or damaged.",
        _AGAIN,
    ),
    _rule(
        Code.NO_GPU,
        r"(?P<why>no CUDA-capable device|CUDA driver version is insufficient|no kernel image is available|invalid device: .+)",
        "The GPU cannot be used ({why}).",
        "Update its driver, install the engine build for it, or set gpu_layers to 0.",
    ),
)

RULES = (*_INSTALLATION, *_OPTIONS, *OUT_OF_MEMORY, *_MODEL)

_PATH_SAID = re.compile(r"failed to load model(?:,? '| from )(?P<path>.+?)'?$", re.MULTILINE)
_AMOUNTS = (
    (re.compile(r"attempted to allocate ([\d.]+) MB"), 1 << 20),
    (re.compile(r"allocating ([\d.]+) MiB"), 1 << 20),
    (re.compile(r"buffer of size (\d+)"), 1),
)


def find(rules: Iterable[Rule], text: str, *, port: int | None, path: str, peak_memory_bytes: int | None) -> Finding | None:
    """The first rule found in the lines, None where they tell nothing known."""
    for rule in rules:
        found = rule.pattern.search(text)
        if found is None:
            continue
        said = _PATH_SAID.search(text)
        values = {
            "port": port if port is not None else "of the engine",
            "path": (said["path"] if said else path) or "of this model",
            "amount": _amount(text, peak_memory_bytes),
            **{name: (value or "?").strip().rstrip(".") for name, value in found.groupdict().items()},
        }
        return Finding(rule.code, rule.what.format_map(values), rule.remedy)
    return None


def _amount(text: str, peak_memory_bytes: int | None) -> str:
    """“: it asked for 1,440 MiB at once and had used 820 MiB”, as far as that is known."""
    asked = next((float(found[1]) * unit for pattern, unit in _AMOUNTS if (found := pattern.search(text))), None)
    parts = []
    if asked is not None:
        parts.append(f"it asked for {asked / (1 << 20):,.0f} MiB at once")
    if peak_memory_bytes:
        parts.append(f"it had used {peak_memory_bytes / (1 << 20):,.0f} MiB")
    return f": {' and '.join(parts)}" if parts else ""
