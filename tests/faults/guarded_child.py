"""A program that starts a child as vLLM does: METHOD NAME, and how the child is guarded."""

import ctypes
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from threading import Thread
from typing import Any

from lvllm.faults.orphans import GuardedTarget, end_with_the_parent


def live() -> None:
    print(os.getpid(), flush=True)
    time.sleep(60)


def live_as_a_worker() -> None:
    """vLLM loads the plugins in a process that was spawned, and takes a forked one to have them."""
    if multiprocessing.get_start_method() == "spawn":
        end_with_the_parent()
    live()


def live_deaf() -> None:
    """As a worker in C++ that keeps Python's lock, so that no other thread does anything."""
    end_with_the_parent()
    print(os.getpid(), flush=True)
    ctypes.PyDLL(None).sleep(60)


def find() -> Callable[[], None]:
    return live


if __name__ == "__main__":
    method, name, how = sys.argv[1:]
    multiprocessing.set_start_method(method)
    end_with_the_parent()  # In the front process, it does nothing but prepare for forks.
    targets: dict[str, Callable[..., Any]] = {
        "target": GuardedTarget(find, live),
        "deaf": live_deaf,
    }
    process = multiprocessing.Process(target=targets.get(how, live_as_a_worker), name=name)
    if how in ("thread", "deaf"):
        thread = Thread(target=process.start)
        thread.start()
        thread.join()
    else:
        process.start()
    process.join()
