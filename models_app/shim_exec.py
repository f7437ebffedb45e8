"""Become the engine, bound to the life of the shim. Standard library only; run by path: shim_exec.py <shim pid> <argv…>.

The kernel kills this process when its parent dies (PR_SET_PDEATHSIG survives exec). A parent that died before the call
is noticed by asking for the parent again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
EXIT_NO_PARENT = 125
EXIT_CANNOT_EXEC = 127


def main(arguments: list[str]) -> int:
    """Exec argv; returns only where that is impossible."""
    parent, argv = int(arguments[0]), arguments[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.stderr.write(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}\n")
        return EXIT_NO_PARENT
    if os.getppid() != parent:
        return EXIT_NO_PARENT
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and exec would hand that on
    try:
        os.execvpe(argv[0], argv, os.environ)  # noqa: S606  # an argv list, no shell
    except OSError as error:
        sys.stderr.write(f"cannot start {argv[0]}: {error.strerror}\n")
        return EXIT_CANNOT_EXEC


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
