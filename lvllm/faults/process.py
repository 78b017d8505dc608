"""How an error that a worker meets ends the server: in one line, which the front process prints.

vLLM starts its engine, and that its workers, as processes that say of an error no more than that
there was one; each of them prints a traceback on the way. So the line goes around them, through a
file without a name that the front process made, and each of them leaves quietly.
"""

import os
from typing import Any, NoReturn

__all__ = ["end", "end_now", "follow", "install", "prepare"]

# PROCESS:FILE DESCRIPTOR of the front process.
_VARIABLE = "_LVLLM_FAILURE"


def prepare() -> None:
    """In the front process, before the others start."""
    if _front() != os.getpid():
        descriptor = os.memfd_create("lvllm-failure")
        os.environ[_VARIABLE] = f"{os.getpid()}:{descriptor}"
    os.truncate(_path(), 0)  # what an earlier model of this process met


def end(line: str) -> NoReturn:
    """End this process because of what `line` says; the front process will print it."""
    line = " ".join(line.split())
    if _report(line):
        raise SystemExit(1)
    raise SystemExit(f"lvllm: {line}")


def end_now(line: str) -> NoReturn:
    """End this process from any of its threads, whatever the others hang in.

    The line is printed here, too: of a process that ends later than at the start, the front one
    says only that it has.
    """
    line = " ".join(line.split())
    _report(line)
    os.write(2, f"lvllm: {line}\n".encode())
    os._exit(1)


def follow() -> None:
    """End this process quietly if another one has said why it ended."""
    if _reported() is not None:
        raise SystemExit(1)


def install() -> None:
    """Make vLLM end in that line, where it would say that a process failed."""
    from vllm.v1.engine import utils
    from vllm.v1.executor.multiproc_executor import WorkerProc

    _wrap(utils, "wait_for_engine_startup")  # the front process waits for the engine's
    _wrap(WorkerProc, "wait_for_ready", staticmethod)  # the engine's for the workers


def _wrap(owner: Any, name: str, kind: Any = lambda function: function) -> None:
    upstream = getattr(owner, name)
    if upstream.__module__ == __name__:
        return

    def wait(*arguments: Any, **options: Any) -> Any:
        try:
            return upstream(*arguments, **options)
        except Exception:
            line = _reported()
            if line is None:
                raise
            if _front() == os.getpid():
                raise SystemExit(f"lvllm: {line}") from None
            raise SystemExit(1) from None

    setattr(owner, name, kind(wait))


def _front() -> int | None:
    value = os.environ.get(_VARIABLE)
    return int(value.partition(":")[0]) if value else None


def _report(line: str) -> bool:
    """Leave the line for the front process; False if that is this one, or out of reach."""
    if _front() in (None, os.getpid()):
        return False
    try:
        # The first of several ranks that fail alike is enough.
        with open(_path(), "a") as file:
            file.write(f"{line}\n")
    except OSError:
        return False  # on another host, say
    return True


def _path() -> str:
    process, _, descriptor = os.environ[_VARIABLE].partition(":")
    return f"/proc/{process}/fd/{descriptor}"


def _reported() -> str | None:
    try:
        with open(_path()) as file:
            return file.readline().rstrip("\n") or None
    except (OSError, KeyError):
        return None
