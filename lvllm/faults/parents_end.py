"""Lets the kernel kill a process at the end of its parent."""

import ctypes
import signal

__all__ = ["die_with_the_parent"]

LIBC = ctypes.CDLL(None)
SIGNAL_AT_PARENTS_END = 1
"""PR_SET_PDEATHSIG of prctl."""


def die_with_the_parent() -> None:
    """Let the kernel kill this process when the thread that made it has ended.

    A parent that has ended before is not noticed. This may run between fork and exec.
    """
    LIBC.prctl(SIGNAL_AT_PARENTS_END, signal.SIGKILL, 0, 0, 0)
