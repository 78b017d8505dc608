"""Lets the kernel kill a process at the end of its parent."""

import ctypes
import os
import signal

__all__ = ["die_with_the_parent"]

LIBC = ctypes.CDLL(None)
SIGNAL_AT_PARENTS_END = 1
"""PR_SET_PDEATHSIG of prctl."""


def die_with_the_parent(parent: int | None = None) -> None:
    """Let the kernel kill this process when the thread that made it has ended.

    A parent that has ended before is noticed only if its number is given. Without it, this may run
    between fork and exec.
    """
    LIBC.prctl(SIGNAL_AT_PARENTS_END, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
