"""What can be told of a GGUF file without loading it."""

from __future__ import annotations

from pathlib import Path

from models_app.exceptions import PreflightError

MAGIC = b"GGUF"


def check(path: Path) -> None:
    """Raise PreflightError unless this is a readable file that begins like a GGUF model."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise PreflightError(f"{path} cannot be read ({error.strerror}); mend its permissions or choose another file.") from error
    if start.startswith(MAGIC):
        return
    if not start:
        raise PreflightError(f"{path} is empty; download it again.")
    if start.lstrip().startswith((b"<", b"{")) or start.startswith(
        (b"Entry not found", b"Not Found", b"version https://git-lfs")
    ):
        raise PreflightError(f"{path} is a saved web answer, not a model; download it again from the right address.")
    raise PreflightError(f"{path} is not a GGUF file (it begins with {start[:4]!r}); choose a model in GGUF format.")
