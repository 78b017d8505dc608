"""Processes of vLLM that end without taking their interpreter apart.

At its end, Python visits the 700,000 objects that vLLM and PyTorch have made, several times. This
takes 1 to 3 s of a core in each process, and one after the other: the engine waits for its workers,
and the front process for the engine. Meanwhile the memory of a server that a supervisor wants to
start again is in use.
"""

import atexit
import gc
import multiprocessing
import os
import sys
import traceback
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path
from typing import NoReturn

from lvllm.faults import process
from lvllm.faults.orphans import is_in_vllms

__all__ = ["collect_nothing_more", "end_in_a_line", "leave_after_the_work", "leave_with_the_error"]

LAST = -1000
"""The priority of what multiprocessing calls last at the end of a process."""


def leave_after_the_work() -> None:
    """Let this process end right after its work and its exit handlers, if vLLM has spawned it.

    A forked process ends so by itself, without the exit handlers, which are its parent's.
    """
    if _is_spawned_by_vllm():
        Finalize(None, _leave, exitpriority=LAST)


def collect_nothing_more() -> None:
    """Hide all objects from the garbage collector, if this process is to end after its work.

    vLLM's workers call the collector at their end, which takes 1 to 2 s.
    """
    if _is_spawned_by_vllm():
        gc.freeze()


def end_in_a_line(line: str) -> NoReturn:
    """End with status 1 and this line: a command at once, another program by SystemExit."""
    if _is_command():
        sys.stderr.write(f"{line}\n")
        _leave_with(1)
    raise SystemExit(line)


def leave_with_the_error() -> None:
    """Where an error is handled, end a command at once, as that error would end it."""
    if _is_command():
        _leave()


def _is_spawned_by_vllm() -> bool:
    return "--multiprocessing-fork" in sys.orig_argv and is_in_vllms()


def _is_command() -> bool:
    own = process.is_command() or Path(sys.argv[0]).name == "lvllm"
    return own and multiprocessing.parent_process() is None


def _leave() -> None:
    """End this process with the status that Python would give it, and with its words."""
    error = sys.exc_info()[1]  # what has ended the work
    if error is None:
        _leave_with(0)
    elif not isinstance(error, SystemExit):
        if multiprocessing.parent_process() is not None:
            sys.stderr.write(f"Process {multiprocessing.current_process().name}:\n")
        traceback.print_exception(error)
        _leave_with(1)
    elif error.code is None or isinstance(error.code, int):
        _leave_with(error.code or 0)
    else:
        sys.stderr.write(f"{error.code}\n")
        _leave_with(1)


def _leave_with(status: int) -> NoReturn:
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(status)
