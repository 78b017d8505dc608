"""Runs a server and ends it, with all of its processes, when whoever asked for it is gone.

    python guardian.py FD COMMAND [ARGUMENT]...

FD is the reading end of a pipe whose writing end the caller keeps open. The kernel closes it
however the caller ends, with SIGKILL too. The guardian leads a session of its own, so that one
signal reaches every process of the server: vLLM's engine processes outlive a server that is killed
while it starts, and a SIGTERM that comes at that time is lost. If the guardian itself is killed,
the kernel kills the server.
"""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial

from lvllm.faults.parents_end import die_with_the_parent

STOP_SECONDS = 20
"""How long the server has to end by itself."""


def guard(pipe: int, command: list[str]) -> int:
    """Run `command` until it ends or `pipe` is closed. Returns its exit code."""
    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(one, lambda *_: None)  # The server would inherit SIG_IGN.
    ending = partial(_end_with, os.getpid())
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=ending)
    while process.poll() is None:
        readable, _, _ = select.select([pipe], [], [], 0.2)
        if readable:
            _stop(process)
    return process.returncode


def _end_with(parent: int) -> None:
    """In the child: let the kernel kill this process when its `parent` has ended."""
    die_with_the_parent()  # The guardian has one thread, which made this process.
    if os.getppid() != parent:  # It ended before.
        os._exit(1)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask the server to stop, and then end everything in the session, this process included."""
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    with suppress(ProcessLookupError):
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), sys.argv[2:]))
