"""What must hold of a model, an alias and a remote server beyond one field; forms and REST ask here before they save.

Every check raises ValidationError with a dict by field name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from django.conf import settings
from django.core.exceptions import ValidationError

from models_app.exceptions import PathNotAllowed
from models_app.models import ModelAlias, ModelConfig, RemoteServer
from models_app.models.model_config import MODEL_NAME

PATH_FIELDS = ("chat_model_path", "embedding_model_path", "tts_model_path")
MAX_EXTRA_ARGS = 16 * 1024  # characters of JSON
MAX_OFFERED_FILES = 200


def check_model(model: ModelConfig, changed: Collection[str]) -> None:
    """Its name is not an alias's, its changed files are where model files may be, its extra arguments are an object, its
    fixed port is one process's.
    """
    errors: dict[str, str] = {}
    if ModelAlias.objects.filter(name=model.name).exists():
        errors["name"] = f"“{model.name}” is the name of an alias already; choose another or delete that alias."
    for field in PATH_FIELDS:
        if field in changed and (raw := getattr(model, field)):
            try:
                resolve_model_path(raw)
            except PathNotAllowed as error:
                errors[field] = str(error)
    if model.port is not None and len(model.parts) > 1 and {"port", "one_process", *PATH_FIELDS}.intersection(changed):
        errors["port"] = f"Two processes cannot have one port; leave it empty, for each of {', '.join(model.parts)} has its own."
    if not isinstance(model.extra_args, dict):
        errors["extra_args"] = 'Give an object of names and values, such as {"cache_prompt": true}.'
    elif len(json.dumps(model.extra_args)) > MAX_EXTRA_ARGS:
        errors["extra_args"] = f"That is more than {MAX_EXTRA_ARGS} characters."
    if errors:
        raise ValidationError(errors)


def check_alias(alias: ModelAlias) -> None:
    """An alias must not hide a model."""
    if ModelConfig.objects.filter(name=alias.name).exists():
        raise ValidationError({"name": f"“{alias.name}” is the name of a model already; an alias must be another name."})


def check_remote_server(remote: RemoteServer) -> None:
    """Its address fits its kind and its model table is names to names."""
    errors: dict[str, str] = {}
    problem = _openai_address(remote.address) if remote.kind == RemoteServer.Kind.OPENAI else _grpc_address(remote.address)
    if problem:
        errors["address"] = problem
    table = remote.models
    if not isinstance(table, dict) or not all(map(_is_foreign_name, table.values())):
        errors["models"] = 'Give an object of names here and names there, such as {"gpt-4o": "gpt-4o"}.'
    elif wrong := [ours for ours in table if not _is_model_name(ours)]:
        errors["models"] = f"Not a model name: {', '.join(wrong)}. {MODEL_NAME.message}"
    if errors:
        raise ValidationError(errors)


def resolve_model_path(raw: str) -> Path:
    """The real file behind a configured path: inside an allowed folder, symbolic links followed, and there on this node.

    Raises PathNotAllowed naming the allowed folders. Relative paths are looked for in each allowed folder.
    """
    folders: list[Path] = settings.ASSISTANT_MODEL_DIRS
    allowed = ", ".join(str(folder) for folder in folders)
    if "\0" in raw:
        raise PathNotAllowed("A path cannot contain a zero byte.")
    path = Path(raw)
    candidates = [path] if path.is_absolute() else [folder / path for folder in folders]
    # What lies elsewhere is refused before anything is said about whether it exists.
    inside = [real for real in map(_real, candidates) if any(real.is_relative_to(folder.resolve()) for folder in folders)]
    if not inside:
        raise PathNotAllowed(f"{raw} is outside the folders for model files, which are: {allowed} (ASSISTANT_MODEL_DIRS).")
    found = next((real for real in inside if _holds(real.is_file)), None)
    if found is None:
        raise PathNotAllowed(f"There is no file {raw} on this node. Model files may be in: {allowed}.")
    return found


def offered_files() -> list[str]:
    """GGUF files in the allowed folders, to choose from in a form; the first 200 by folder and name."""
    found: list[str] = []
    for folder in settings.ASSISTANT_MODEL_DIRS:
        for file in _ggufs(folder):
            if len(found) == MAX_OFFERED_FILES:
                return found
            found.append(str(file))
    return found


def _is_foreign_name(name: object) -> bool:
    return isinstance(name, str) and bool(name.strip()) and name.isprintable()


def _is_model_name(name: str) -> bool:
    try:
        MODEL_NAME(name)
    except ValidationError:
        return False
    return True


def _real(path: Path) -> Path:
    """Links followed as far as the path exists; a loop of links raises PathNotAllowed."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        raise PathNotAllowed(f"{path} cannot be followed to a file.") from None


def _holds(test: Callable[[], bool]) -> bool:
    """What Path.is_file or is_dir says; no where the system refuses to look (a name too long, a folder closed to us)."""
    try:
        return test()
    except OSError:
        return False


def _ggufs(folder: Path, depth: int = 3) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.suffix.lower() == ".gguf" and _holds(entry.is_file):
            yield entry
        elif depth and _holds(entry.is_dir) and not entry.is_symlink():
            yield from _ggufs(entry, depth - 1)


def _openai_address(address: str) -> str:
    """What is wrong with the base URL of an OpenAI-compatible server, or nothing."""
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        return "This is not a URL; it must look like https://api.example.org/v1."
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
        return "This must be an http or https URL such as https://api.example.org/v1."
    if parts.username or parts.password:
        return "Leave user and password out of the URL; the secret goes into its own field."
    if parts.query or parts.fragment or any(letter.isspace() for letter in address):
        return "Give the base URL alone, without “?”, “#” or blanks."
    if not parts.path.rstrip("/").endswith("/v1"):
        return "The base URL must end in /v1."
    return ""


def _grpc_address(address: str) -> str:
    """What is wrong with host:port of a peer Assistant, or nothing."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host or " " in address:
        return "This must be host:port, such as gpu-2.example.org:50051."
    return ""
