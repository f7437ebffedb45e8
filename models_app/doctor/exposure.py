"""Who could get at what: modes of files, and addresses that others reach."""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from django.conf import settings

from models_app.doctor.finding import Context, Finding, fail, ok, warn

LISTENERS = ("ASSISTANT_HTTP_ADDR", "ASSISTANT_GRPC_ADDR")


def check_files(context: Context) -> Iterable[Finding]:
    findings = list(judge_private(_private_paths(), os.getuid()))
    findings += [finding for folder in settings.ASSISTANT_MODEL_DIRS for finding in judge_model_folder(folder)]
    return findings or [ok(f"Secrets, sockets and data under {settings.ASSISTANT_HOME} are for their owner alone.")]


def _private_paths() -> Iterator[Path]:
    home = Path(settings.ASSISTANT_HOME)
    yield home
    yield from (Path(settings.ASSISTANT_RUN_DIR), home / "secrets", home / "valkey", Path(settings.ASSISTANT_SPOOL_DIR))
    yield from (Path(settings.ASSISTANT_INSTANCES_DIR), Path(settings.ASSISTANT_LOG_DIR))
    if (home / "secrets").is_dir():
        yield from sorted((home / "secrets").iterdir())
    yield from sorted(home.glob("*.sqlite3*"))


def judge_private(paths: Iterable[Path], us: int) -> Iterator[Finding]:
    """A failure for each that exists and that somebody else owns or may read or enter."""
    for path in paths:
        try:
            status = path.lstat()
        except OSError:
            continue
        mode = stat.S_IMODE(status.st_mode)
        wanted = "700" if stat.S_ISDIR(status.st_mode) else "600"
        if status.st_uid != us:
            yield fail(f"{path} belongs to user id {status.st_uid}.", f"Run: chown {us} {path}.")
        elif mode & 0o077:
            yield fail(f"{path} is open to other users (mode {mode:o}).", f"Run: chmod {wanted} {path}.")


def judge_model_folder(folder: Path) -> Iterator[Finding]:
    """A model file is code of a kind: who may replace it decides what is served."""
    try:
        mode = folder.stat().st_mode
    except OSError:
        return
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        yield warn(f"Everybody on this machine may replace model files in {folder}.", f"Run: chmod o-w {folder}.")


def check_addresses(context: Context) -> Iterable[Finding]:
    findings = [finding for name in LISTENERS for finding in judge_address(name, getattr(settings, name)[0])]
    return findings or [ok("Nothing listens beyond this machine.")]


def judge_address(setting: str, host: str) -> Iterator[Finding]:
    if not is_loopback(host):
        yield warn(
            f"{setting} listens on {host} without TLS: keys and texts can be read on the way.",
            "Keep it on loopback behind a proxy that speaks TLS, or in a private network.",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it; a name other than localhost may be anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
