"""Enabled models: their files are there, whole and the right ones, and their engine would take them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from models_app import catalog, engine_access, fit, launch_spec
from models_app.admission import Kind
from models_app.doctor.finding import Context, Finding, fail, ok, warn
from models_app.exceptions import CatalogError, PathNotAllowed, PreflightError
from models_app.model_rules import PATH_FIELDS, resolve_model_path
from models_app.models import ModelConfig


def check(context: Context) -> Iterable[Finding]:
    models = list(ModelConfig.objects.enabled())
    if not models:
        yield warn("No model is enabled.", "Add one in the admin, or with manage.py fetch_model.")
    for model in models:
        yield from check_model(model)


def check_model(model: ModelConfig) -> Iterator[Finding]:
    """What its engine says to each of its parts: files there, allowed, whole; template and settings known."""
    problems = list(dict.fromkeys(filter(None, (_problem(model, part) for part in model.parts))))
    yield from (fail(f"{model.name} cannot start: {problem}") for problem in problems)
    if not problems:
        yield judge_memory(model)


def judge_memory(model: ModelConfig) -> Finding:
    """Whether it would find room on this node with nothing else there."""
    verdict = fit.judge_model(model).verdict
    if verdict.kind == Kind.NEVER:
        return fail(f"{model.name} cannot start: {verdict.sentence}")
    return ok(f"{model.name} could start on {model.engine}.")


def _problem(model: ModelConfig, part: str) -> str:
    try:
        engine_access.adapter(model.engine).preflight(launch_spec.model_spec(model, part))
    except PreflightError as error:
        return str(error)
    return ""


def check_hashes(context: Context) -> Iterable[Finding]:
    """Compare every file of an enabled model that the catalogue knows by its name."""
    try:
        known = {entry.file: entry for entry in catalog.load().values()}
    except CatalogError as error:
        yield fail(str(error), "Put back the catalogue that came with Assistant.")
        return
    for file in sorted(_files()):
        if file.name in known:
            yield judge_hash(file, sha256_of(file), known[file.name])


def _files() -> set[Path]:
    found = set()
    for model in ModelConfig.objects.enabled():
        for text in filter(None, (getattr(model, field) for field in PATH_FIELDS)):
            try:
                found.add(resolve_model_path(text))
            except PathNotAllowed:
                continue  # check() has said so
    return found


def sha256_of(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def judge_hash(file: Path, digest: str, entry: catalog.Entry) -> Finding:
    if digest != entry.sha256:
        return fail(
            f"{file} is not what the catalogue calls {entry.name} (SHA-256 {digest[:12]}…, not {entry.sha256[:12]}…).",
            f"Remove it and run: manage.py fetch_model {entry.name}.",
        )
    return ok(f"{file.name} is exactly what the catalogue says.")
