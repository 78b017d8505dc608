"""A program that starts a child as vLLM does: METHOD NAME, and how the child is guarded."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from threading import Thread

from lvllm.faults.orphans import GuardedTarget, end_with_the_parent


def live() -> None:
    print(os.getpid(), flush=True)
    time.sleep(60)


def live_as_a_worker() -> None:
    """vLLM loads the plugins in a process that was spawned, and takes a forked one to have them."""
    if multiprocessing.get_start_method() == "spawn":
        end_with_the_parent()
    live()


def find() -> Callable[[], None]:
    return live


if __name__ == "__main__":
    method, name, how = sys.argv[1:]
    multiprocessing.set_start_method(method)
    end_with_the_parent()  # In the front process, it does nothing but prepare for forks.
    target = GuardedTarget(find, live) if how == "target" else live_as_a_worker
    process = multiprocessing.Process(target=target, name=name)
    if how == "thread":
        thread = Thread(target=process.start)
        thread.start()
        thread.join()
    else:
        process.start()
    process.join()
