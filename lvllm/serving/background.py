"""Runs `vllm serve` beside a chat: starts it, waits until it answers, and stops it."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from lvllm.errors import LvllmError
from lvllm.serving import guardian
from lvllm.serving.launch import Launch

__all__ = ["ServerError", "free_port", "running"]

TAIL = 15
"""Lines of the log that are shown when the server fails."""
KERNELS_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST_PORT = 20_000
"""Services of a system listen below, and Ray keeps ports from 10002 to 19999 for its workers."""
TRIES = 100


class ServerError(LvllmError):
    """The server did not start. The text has the end of its log."""


def free_port() -> int:
    """A port of this host on which nobody listens.

    A server takes seconds until it listens. Meanwhile the kernel may give any port of its range to
    others, such as ranks that wait for each other. So this is a port below that range, if possible.
    """
    for port in (*_below_the_kernels(), 0):  # 0 is a port that the kernel gives.
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise ServerError("no port of this host is free")


def _below_the_kernels() -> list[int]:
    """Some ports that the kernel gives to nobody, or none where its range is not known."""
    try:
        end = int(KERNELS_PORTS.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return []
    below = range(FIRST_PORT, end)
    # Programs that draw the same data, as tests do, want different ports.
    return random.SystemRandom().sample(below, min(TRIES, len(below)))


@contextmanager
def running(launch: Launch, url: str, log: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Run the server until the block ends; the block begins when `url`/health answers.

    Args:
        log: where the server's output goes.
        say: is told the newest line of the log, several times a second.

    Raises ServerError if the server ends instead.
    """
    reading, writing = os.pipe()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, guardian.__file__, str(reading), *launch.command],
            env=launch.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(reading,),
            start_new_session=True,  # so that Ctrl-C stops an answer and not the server
        )
    os.close(reading)
    try:
        _wait(process, url, log, say)
        yield
    finally:
        os.close(writing)  # The guardian ends the server, and then itself.
        process.wait()


def _wait(
    process: subprocess.Popen[bytes], url: str, log: Path, say: Callable[[str], None]
) -> None:
    while process.poll() is None:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200:
                return
        say(_last_line(log))
        time.sleep(0.3)
    lines = log.read_text(errors="replace").splitlines()
    # LvLLM ends with one line about what is wrong; where it is there, nothing else is needed.
    said = [line for line in lines if line.startswith("lvllm: ")]
    if said:
        raise ServerError(said[-1].removeprefix("lvllm: "))
    tail = "\n".join(lines[-TAIL:])
    raise ServerError(f"the server ended with code {process.returncode}; the end of {log}:\n{tail}")


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
