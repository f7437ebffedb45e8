"""The target of a fetch: its part file, lock, space and checks."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from models_app.downloads.progress import Phase, Progress
from models_app.exceptions import DownloadError

CHUNK = 1024 * 1024  # bytes read and hashed at once
SPACE_MARGIN = 64 * 1024 * 1024  # bytes left free beside the file
POLL_S = 0.2
GGUF_MAGIC = b"GGUF"

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,200}")


class Wanted(Protocol):
    """What to fetch; catalogue entries are such."""

    @property
    def source(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def bytes(self) -> int: ...


class WrongContent(DownloadError):
    """What came can never become the file, so nothing of it is kept."""


def check_file_name(name: str) -> str:
    """The name, if it is plain enough to be a file of a models folder."""
    if not _FILE_NAME.fullmatch(name) or name.endswith(".part"):
        raise DownloadError(f"{name!r} is no file name: use letters, digits and . _ + - and start with a letter or digit.")
    return name


class Sink:
    """The part file, and all that is checked on the way into it."""

    def __init__(self, handle: BinaryIO, target: Path, wanted: Wanted, progress: Progress) -> None:
        self.target = target
        self.wanted = wanted
        self.progress = progress
        self.done = 0
        self.resumed = False  # some of it came from another answer than the rest
        self._handle = handle
        self._hash = hashlib.sha256()

    def take_over(self) -> None:
        """Count and hash what an earlier fetch left; start anew where that cannot be right."""
        for chunk in iter(lambda: self._handle.read(CHUNK), b""):
            self._hash.update(chunk)
            self.done += len(chunk)
            if self.done > self.wanted.bytes:
                return self.restart()
            self.progress(self.done, self.wanted.bytes, Phase.VERIFYING)
        return None

    def restart(self) -> None:
        """Forget everything written."""
        self._handle.seek(0)
        self._handle.truncate()
        self._hash = hashlib.sha256()
        self.done = 0
        self.resumed = False

    def write(self, chunk: bytes, phase: Phase) -> None:
        """Append; raises as soon as the bytes cannot be right."""
        if self.done < len(GGUF_MAGIC):
            self._check_magic(chunk)
        if self.done + len(chunk) > self.wanted.bytes:
            raise WrongContent(f"{self.wanted.file}: more than the expected {self.wanted.bytes:,} bytes came; check its source.")
        with disk_errors(self.target):
            self._handle.write(chunk)
        self._hash.update(chunk)
        self.done += len(chunk)
        self.progress(self.done, self.wanted.bytes, phase)

    def _check_magic(self, chunk: bytes) -> None:
        expected = GGUF_MAGIC[self.done : self.done + len(chunk)]
        if self.wanted.file.lower().endswith(".gguf") and chunk[: len(expected)] != expected:
            raise WrongContent(
                f"{self.wanted.file} would not be a GGUF file: the source answered with something else, often a web page; "
                "check the source."
            )

    def right(self) -> bool:
        """Whether everything is here and has the expected SHA-256."""
        return self.done == self.wanted.bytes and self._hash.hexdigest() == self.wanted.sha256

    def finish(self) -> None:
        """Move the file into place, or say that it is wrong."""
        target = self.target
        if self.done != self.wanted.bytes:
            raise WrongContent(f"{target.name}: {self.done:,} of {self.wanted.bytes:,} bytes came; check its source.")
        if not self.right():
            raise WrongContent(
                f"{target.name} has SHA-256 {self._hash.hexdigest()}, not the expected {self.wanted.sha256}; nothing was kept. "
                "Try again, and if it stays so the source has changed: do not use it."
            )
        with disk_errors(target):
            self._handle.flush()
            os.fsync(self._handle.fileno())
            part_of(target).rename(target)
            _sync_folder(target.parent)


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


@contextlib.contextmanager
def claimed(target: Path, progress: Progress) -> Iterator[BinaryIO | None]:
    """The locked part file; None where another fetch finished the target meanwhile.

    Whoever had the lock before may have renamed or removed the file we opened, so after the lock we look whether it is
    still the one under its name.
    """
    part = part_of(target)
    while True:
        with disk_errors(part):
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "r+b") as handle:
            _lock(handle, progress)
            if not _still_named(handle, part):
                continue
            if target.exists():
                part.unlink()
                yield None
            else:
                yield handle
            return


def _lock(handle: BinaryIO, progress: Progress) -> None:
    """Wait for the lock in a way that `progress` can end."""
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(0, None, Phase.WAITING)
            time.sleep(POLL_S)
        else:
            return


def _still_named(handle: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed + SPACE_MARGIN > free:
        raise DownloadError(
            f"{target.name} needs {needed / 1e6:,.0f} MB in {target.parent}, where {free / 1e6:,.0f} MB are free; "
            "make room or choose another folder."
        )


def _sync_folder(folder: Path) -> None:
    """Make the rename outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DownloadError(
            f"Cannot write {path}: {error.strerror or error}; check the folder, its owner and its space."
        ) from error


def verify(wanted: Wanted, target: Path, progress: Progress) -> None:
    """Check a file that is already there; it is never overwritten, because it may be the user's own."""
    remedy = "remove it to fetch it again, or choose another folder."
    try:
        with target.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            if size != wanted.bytes:
                raise DownloadError(f"{target} has {size:,} bytes, not the expected {wanted.bytes:,}; {remedy}")
            digest, done = hashlib.sha256(), 0
            for chunk in iter(lambda: handle.read(CHUNK), b""):
                digest.update(chunk)
                done += len(chunk)
                progress(done, size, Phase.VERIFYING)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DownloadError(f"Cannot read {target}: {error.strerror}; {remedy}") from error
    if digest.hexdigest() != wanted.sha256:
        raise DownloadError(f"{target} is not the expected file (SHA-256 {digest.hexdigest()}); {remedy}")
