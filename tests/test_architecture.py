"""The shape of the code base, held by tests: sizes, exceptions, layout, documentation. Import directions: import-linter."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("assistant_site", "models_app", "gateway_app")
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$|/migrations/")

FUNCTION_LINES = 60
FILE_LINES = 400
TEST_FILE_LINES = 600

# One boundary per process may catch everything, because nothing above it would.
BROAD_EXCEPT_BOUNDARIES = {"assistant_site/supervisor.py:run", "gateway_app/snapshot.py:_run"}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}


def sources(*roots: str) -> Iterator[tuple[str, ast.Module, str]]:
    for root in roots:
        for path in sorted((ROOT / root).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not GENERATED.search(name):
                text = path.read_text()
                yield name, ast.parse(text, name), text


def test_no_function_is_longer_than_sixty_lines() -> None:
    long = [
        f"{name}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for name, tree, _ in sources(*PACKAGES, "tests")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    ]
    assert not long


def test_no_file_outgrows_its_concept() -> None:
    long = [
        f"{name} has {text.count(chr(10))} lines"
        for name, _, text in sources(*PACKAGES, "tests")
        if text.count("\n") > (TEST_FILE_LINES if name.startswith("tests/") else FILE_LINES)
    ]
    assert not long


def is_broad(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or (isinstance(kind, ast.Name) and kind.id in {"Exception", "BaseException"}) for kind in kinds)


def reraises(handler: ast.ExceptHandler) -> bool:
    """Cleaning up and raising on is no swallowing."""
    return any(isinstance(node, ast.Raise) and node.exc is None for node in ast.walk(handler))


def enclosing(tree: ast.Module, line: int) -> str:
    functions = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]
    return max(functions, key=lambda node: node.lineno).name if functions else "<module>"


def test_broad_except_only_at_the_named_boundaries() -> None:
    found = {
        f"{name}:{enclosing(tree, node.lineno)}"
        for name, tree, _ in sources(*PACKAGES)
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and is_broad(node) and not reraises(node)
    }
    assert found == BROAD_EXCEPT_BOUNDARIES


def test_no_file_has_a_name_that_says_nothing() -> None:
    vague = [name for name, _, _ in sources(*PACKAGES, "tests") if Path(name).stem in VAGUE_NAMES]
    assert not vague


def test_every_module_says_what_it_is() -> None:
    silent = [name for name, tree, text in sources(*PACKAGES) if text.strip() and not ast.get_docstring(tree)]
    assert not silent


def test_few_tests_patch_anything() -> None:
    tests = patches = 0
    for name, tree, text in sources("tests"):
        tests += sum(
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_") for node in ast.walk(tree)
        )
        if name != "tests/test_architecture.py":
            patches += len(re.findall(r"monkeypatch\.setattr|mock\.patch|mocker\.patch", text))
    assert patches <= max(3, tests * 3 // 100)


def test_every_setting_is_documented() -> None:
    names = set()
    for file in ("settings.py", "env.py"):
        text = (ROOT / "assistant_site" / file).read_text()
        names |= set(re.findall(r'"(ASSISTANT_[A-Z_]+|DATABASE_URL|REDIS_URL)"', text))
    readme = (ROOT / "README.md").read_text()
    assert names
    assert {name for name in names if f"`{name}`" not in readme} == set()


def test_every_command_is_documented() -> None:
    commands = {
        path.stem
        for package in PACKAGES
        for path in (ROOT / package / "management" / "commands").glob("*.py")
        if path.stem != "__init__"
    }
    readme = (ROOT / "README.md").read_text()
    assert commands
    assert {name for name in commands if f"`{name}`" not in readme and f"manage.py {name}" not in readme} == set()


def test_every_gateway_endpoint_is_documented() -> None:
    from models_app.contracts.traits import TRAITS

    readme = (ROOT / "README.md").read_text()
    paths = {path for traits in TRAITS.values() if traits.local for path in traits.endpoints} | {
        "/v1/models",
        "/healthz",
        "/readyz",
    }
    assert {path for path in paths if f"`{path}`" not in readme} == set()


@pytest.mark.parametrize("module", ["gateway_app.gateway", "gateway_app.management.commands.grpcserver"])
def test_the_lean_processes_import_neither_admin_nor_rest_nor_celery(module: str) -> None:
    script = (
        "import django, sys; django.setup(); import importlib; importlib.import_module(sys.argv[1]);"
        "print(*sorted({m.split('.')[0] if not m.startswith('django.contrib.admin') else m for m in sys.modules}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, module],
        cwd=ROOT,
        env={**__import__("os").environ, "DJANGO_SETTINGS_MODULE": "assistant_site.settings_gateway"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    forbidden = {"django.contrib.admin", "unfold", "rest_framework", "drf_spectacular", "celery", "kombu", "xllamacpp"}
    assert not forbidden & set(out)


def test_import_contracts_hold() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([str(program)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
