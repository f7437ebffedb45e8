"""Become another program that is told when the process that started it dies. Standard library only.

Run as `python -I -S child_exec.py <parent pid> <signal> <program> [argument …]`. Between Popen and here the parent may
already be gone, and then no death signal would ever come: the parent is looked at again after asking for it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
NOT_STARTED = 127


def main(arguments: list[str]) -> int:
    """Never returns where the program starts; else an exit code, with the reason on standard error."""
    parent, death_signal, *argv = arguments
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
        sys.stderr.write(f"{argv[0]} was not started: prctl failed: {os.strerror(ctypes.get_errno())}\n")
        return NOT_STARTED
    if os.getppid() != int(parent):
        return NOT_STARTED
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and exec would hand that on
    try:
        os.execvp(argv[0], argv)  # noqa: S606  # becoming the program is the point; there is no shell
    except OSError as error:
        sys.stderr.write(f"{argv[0]} was not started: {error.strerror}\n")
    return NOT_STARTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
