"""A program that spawns a child, named as its argument says, which imports for a minute."""

import multiprocessing
import os
import sys
import time
from typing import Any

from lvllm.patches.killed import end_while_importing


def import_much() -> None:
    print(os.getpid(), flush=True)
    time.sleep(60)


class Target:
    """What the child loads before it runs anything."""

    def __call__(self) -> None:
        raise AssertionError("this is never run")

    def __reduce__(self) -> Any:
        return import_much, ()


if __name__ == "__main__":
    end_while_importing.install()
    multiprocessing.set_start_method("spawn")
    process = multiprocessing.Process(target=Target(), name=sys.argv[1])
    process.start()
    process.join()
