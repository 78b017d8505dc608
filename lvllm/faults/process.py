"""How an error that a worker meets ends the server: in one line, which the front process prints.

vLLM starts its engine as a process, and the engine starts the workers. Each parent learns of a
failed child only that it failed, and each process prints a traceback on the way. So the line
travels in a file without a name that the front process made and all of them can open, and each
process leaves quietly.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lvllm.errors import LvllmError

__all__ = [
    "end",
    "end_now",
    "follow",
    "in_one_line",
    "is_command",
    "prepare",
    "refusal",
    "refusing",
    "report",
    "reported",
]

_VARIABLE = "_LVLLM_FAILURE"
"""The environment variable with PROCESS:FILE DESCRIPTOR of the front process."""


def prepare() -> None:
    """In the front process, make the file before the others start."""
    if _front() != os.getpid():
        descriptor = os.memfd_create("lvllm-failure")
        os.environ[_VARIABLE] = f"{os.getpid()}:{descriptor}"
    os.truncate(_path(), 0)  # an earlier model of this process may have failed


def is_command() -> bool:
    """Whether this process runs a command of vLLM, and not a program that uses it as a library."""
    program = sys.argv[0] if sys.argv else ""
    # The others are `python -m vllm.entrypoints...` and what `lvllm serve` starts.
    modules = ("/vllm/entrypoints/", "/lvllm/serving/command.py")
    return Path(program).name == "vllm" or any(module in program for module in modules)


def refusal(line: str) -> BaseException:
    """What to raise where the front process cannot go on because of what `line` says.

    A command of vLLM prints the line and ends with exit code 1. A program that uses vLLM as a
    library gets an LvllmError, which is a ValueError.
    """
    return SystemExit(f"lvllm: {line}") if is_command() else LvllmError(line)


@contextmanager
def refusing() -> Iterator[None]:
    """Raise the `refusal` of an LvllmError that the block raises."""
    try:
        yield
    except LvllmError as error:
        raise refusal(str(error)) from None


def end(line: str) -> NoReturn:
    """End this process because of what `line` says; the front process will print it.

    In the front process itself this raises its `refusal`.
    """
    line = " ".join(line.split())
    if _front() in (None, os.getpid()):
        raise refusal(line) from None
    raise SystemExit(1 if report(line) else f"lvllm: {line}")


def end_now(line: str) -> NoReturn:
    """End this process from any of its threads, even where others hang.

    The line is printed here as well, because the front process prints it only during the start.
    """
    line = " ".join(line.split())
    report(line)
    os.write(2, f"lvllm: {line}\n".encode())
    os._exit(1)


def follow() -> None:
    """End this process quietly if another one has said why it ended."""
    if reported() is not None:
        raise SystemExit(1)


def in_one_line(wait: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that waits for processes as `wait` does, and ends in the line of one.

    The front process raises its `refusal`, and any other leaves quietly. Where no process has left
    a line, the exception of `wait` passes.
    """

    def wait_or_end(*arguments: Any, **options: Any) -> Any:
        try:
            return wait(*arguments, **options)
        except Exception:
            line = reported()
            if line is None:
                raise
            if _front() == os.getpid():
                raise refusal(line) from None
            raise SystemExit(1) from None

    return wait_or_end


def _front() -> int | None:
    value = os.environ.get(_VARIABLE)
    return int(value.partition(":")[0]) if value else None


def report(line: str) -> bool:
    """Leave the line for the front process; False if this is it, or it is out of reach."""
    if _front() in (None, os.getpid()):
        return False
    try:
        # Several ranks may fail alike. Only the first line is read.
        with open(_path(), "a") as file:
            file.write(f"{line}\n")
    except OSError:
        return False  # the front process may be on another host
    return True


def _path() -> str:
    process, _, descriptor = os.environ[_VARIABLE].partition(":")
    return f"/proc/{process}/fd/{descriptor}"


def reported() -> str | None:
    """The first line that a process has left since `prepare`, or None."""
    try:
        with open(_path()) as file:
            return file.readline().rstrip("\n") or None
    except (OSError, KeyError):
        return None
