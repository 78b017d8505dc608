"""A program whose child, spawned and named as its argument says, meets SIGSEGV.

With a second argument, what the child's Python prints goes to a file without a descriptor first.
"""

import importlib
import io
import multiprocessing
import os
import signal
import sys

from lvllm.faults.crashes import end_at_once_on_a_crash


def crash(replaced: bool) -> None:
    if replaced:
        sys.stderr = io.StringIO()
    end_at_once_on_a_crash()
    importlib.import_module("tvm_ffi")
    os.kill(os.getpid(), signal.SIGSEGV)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    process = multiprocessing.Process(target=crash, args=[len(sys.argv) > 2], name=sys.argv[1])
    process.start()
    process.join()
    sys.exit(process.exitcode == -signal.SIGSEGV)
