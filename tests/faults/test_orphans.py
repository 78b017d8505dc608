"""Processes that end with their parent, however it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

SECONDS = 30
CHILD, IMPORTING = (
    f"{__name__.rpartition('.')[0]}.{name}" for name in ("guarded_child", "importing_child")
)


def starts(pid: int) -> str | None:
    """When the process began, which tells it from a later one of its number; None: it has ended."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    return None


def until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def family(request: pytest.FixtureRequest) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A parent and its child, which was started by the parameters."""
    module, *arguments = request.param
    parent = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    yield parent, child
    for pid in (parent.pid, child):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()


@pytest.mark.parametrize(
    "family",
    [
        (CHILD, "spawn", "EngineCore_DP1", "plugin"),
        (CHILD, "fork", "VllmWorker-0", "plugin"),
        (CHILD, "spawn", "VLLM_DP_Coordinator", "target"),
        (CHILD, "fork", "VLLM_DP_Coordinator", "target"),
        (CHILD, "spawn", "VllmWorker-0", "deaf"),
        (CHILD, "fork", "VllmWorker-0", "deaf"),
        (CHILD, "forkserver", "VllmWorker-0", "deaf"),
        (IMPORTING, "VllmWorker-0"),
    ],
    indirect=True,
)
def test_a_child_ends_with_a_killed_parent(
    family: tuple["subprocess.Popen[str]", int],
) -> None:
    parent, child = family
    began = starts(child)
    assert began is not None
    parent.kill()
    parent.wait()
    assert until(lambda: starts(child) != began)


@pytest.mark.parametrize(
    "family",
    [(CHILD, "spawn", "EngineCore_DP1", "plugin"), (CHILD, "fork", "VllmWorker-0", "plugin")],
    indirect=True,
)
def test_a_stopped_child_ends_with_a_killed_parent(
    family: tuple["subprocess.Popen[str]", int],
) -> None:
    parent, child = family
    began = starts(child)
    os.kill(child, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    assert until(lambda: starts(child) != began)


@pytest.mark.parametrize("family", [(CHILD, "spawn", "EngineCore", "thread")], indirect=True)
def test_a_child_outlives_the_thread_that_made_it(
    family: tuple["subprocess.Popen[str]", int],
) -> None:
    """A program may make its engine in a thread that ends."""
    parent, child = family
    began = starts(child)
    threads = Path(f"/proc/{parent.pid}/task")
    assert until(lambda: len([*threads.iterdir()]) == 1)
    time.sleep(0.5)
    assert starts(child) == began
    parent.kill()
    parent.wait()
    assert until(lambda: starts(child) != began)


@pytest.mark.parametrize(
    "family", [(CHILD, "fork", "Process-1", "plugin"), (IMPORTING, "Process-1")], indirect=True
)
def test_processes_of_a_users_program_are_left_alone(
    family: tuple["subprocess.Popen[str]", int],
) -> None:
    parent, child = family
    began = starts(child)
    parent.kill()
    parent.wait()
    time.sleep(1)
    assert starts(child) == began
