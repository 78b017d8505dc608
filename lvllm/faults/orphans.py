"""Processes that end when the one that started them is gone.

vLLM's processes wait for messages of their parent. If that one is killed with SIGKILL, they wait
for ever, and with them the memory of the experts stays in use. Linux can send a signal at a
parent's end (PR_SET_PDEATHSIG), but it takes the thread that made the process for the parent: an
engine that a program makes in a thread would end with that thread. So a thread of each process
waits for the end of the pipe that multiprocessing keeps open in the parent. While a process is
stopped (SIGSTOP), that thread does nothing, and neither while C++ keeps Python's lock: a rank that
looks for a file store that went with the server does so for five minutes. So the kernel is asked to
send SIGKILL at the end of the pipe. It is asked for that at the parent's end as well where the
parent's main thread made the process, as in vLLM's own commands: that thread lives as long as its
process.

A process that is spawned imports vLLM for 5 to 15 s before it loads any plugin. Its parent sends it
a `Birth` ahead of all that it imports, so that it asks the kernel first of all.
"""

import fcntl
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.context import get_spawning_popen
from multiprocessing.util import register_after_fork
from pathlib import Path
from threading import Thread
from types import NoneType
from typing import Any

from lvllm.faults.parents_end import die_with_the_parent

__all__ = ["Birth", "GuardedTarget", "end_with_the_parent", "is_in_vllms", "is_vllms"]

PROCESSES = ("EngineCore", "VllmWorker", "ApiServer", "VLLM_DP_Coordinator")
"""How the names begin that vLLM gives its processes. Those of a user's own program are his."""

AT_BIRTH = """
try:
    from lvllm.faults.parents_end import die_with_the_parent
except ImportError:  # sys.path is not yet as it is in the parent
    pass
else:
    die_with_the_parent({parent})
"""

_guarded: int | None = None
"""The process that was asked last; a forked process has none of its parent's threads."""


def is_vllms(name: str) -> bool:
    """Whether a process of this name is one of vLLM's."""
    return name.startswith(PROCESSES)


def is_in_vllms() -> bool:
    """Whether this process is one of vLLM's."""
    return is_vllms(multiprocessing.current_process().name)


def end_with_the_parent() -> None:
    """Let this process end as soon as its parent has ended, if it is one of vLLM's processes."""
    global _guarded
    if _guarded is None:
        # Plugins are loaded once, and a forked process takes them to be loaded.
        register_after_fork(end_with_the_parent, lambda guard: guard())
    elif _guarded == os.getpid():
        return
    _guarded = os.getpid()
    parent = multiprocessing.parent_process()
    if parent is None or not is_in_vllms():
        return

    if parent.pid is not None:
        _end_with_the_main_thread(parent.pid)
    _end_with_the_pipe(parent.sentinel)

    def wait() -> None:
        parent.join()  # This returns at once if the parent has ended before.
        os.kill(os.getpid(), signal.SIGKILL)

    Thread(target=wait, name="lvllm-parent", daemon=True).start()


def _end_with_the_main_thread(parent: int) -> None:
    """Let the kernel kill this process when its parent has ended, if its main thread made this one.

    If the parent has ended before, the pipe says so.
    """
    try:
        made = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:  # The parent has ended, or the kernel has no such file.
        return
    if str(os.getpid()) in made:
        die_with_the_parent()


def _end_with_the_pipe(end: int) -> None:
    """Let the kernel kill this process when the pipe of which it has this end is closed.

    Nobody writes to the pipe any more, which would send the signal, too.
    """
    with suppress(OSError):  # A kernel may not know how, and the thread is still there.
        fcntl.fcntl(end, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(end, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(end, fcntl.F_SETFL, fcntl.fcntl(end, fcntl.F_GETFL) | os.O_ASYNC)
    if connection.wait([end], 0):  # It was closed before the kernel was asked.
        os.kill(os.getpid(), signal.SIGKILL)


class Birth:
    """Lets a process that is spawned, and gets this from its parent, end with that.

    It does nothing in a process that another thread than the main one makes, or Python's fork
    server.
    """

    def __reduce__(self) -> Any:
        main = threading.current_thread() is threading.main_thread()
        if not main or getattr(get_spawning_popen(), "method", "") != "spawn":
            return NoneType, ()
        return exec, (AT_BIRTH.format(parent=os.getpid()), {})


class GuardedTarget:
    """What a process of vLLM runs that loads no plugins, with `end_with_the_parent` before it.

    Args:
        find: finds the function. A process that is spawned finds vLLM's own.
        original: vLLM's function, for processes that are forked.
    """

    def __init__(
        self, find: Callable[[], Callable[..., Any]], original: Callable[..., Any] | None = None
    ) -> None:
        self._find, self._original = find, original

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        end_with_the_parent()
        return (self._original or self._find())(*arguments, **options)

    def __reduce__(self) -> Any:
        return GuardedTarget, (self._find,)
