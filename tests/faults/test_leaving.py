"""Processes of vLLM that end without taking their interpreter apart."""

import subprocess
import sys
from pathlib import Path

import pytest

CHILD = f"{__name__.rpartition('.')[0]}.leaving_child"


def ended(name: str, how: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", CHILD, name, how], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("returns", 0, []),
        ("exits", 3, []),
        ("fails", 1, ["Process VllmWorker-0:", "ValueError: the reason"]),
    ],
)
def test_a_process_of_vllm_leaves_after_its_exit_handlers(
    how: str, status: int, said: list[str]
) -> None:
    child = ended("VllmWorker-0", how)
    assert child.stdout == "worked\nexit handler\n"
    lines = child.stderr.splitlines()
    assert lines[:1] + lines[-1:] == said
    assert child.returncode == status


@pytest.mark.parametrize(
    ("name", "how", "status"), [("Process-1", "exits", 3), ("EngineCore", "says", 1)]
)
def test_others_end_as_python_ends_them(name: str, how: str, status: int) -> None:
    """A user's own process, and one whose last words multiprocessing prints."""
    child = ended(name, how)
    assert child.stdout == "worked\nexit handler\ntaken apart\n"
    assert child.stderr == ("a line\n" if how == "says" else "")
    assert child.returncode == status


PROGRAM = """
import atexit, sys
from lvllm.faults.leaving import end_in_a_line
atexit.register(print, "exit handler")
try:
    end_in_a_line("lvllm: the reason")
finally:
    print("SystemExit")
"""


@pytest.mark.parametrize(
    ("name", "printed"),
    [("vllm", "exit handler\n"), ("program.py", "SystemExit\nexit handler\n")],
)
def test_a_command_leaves_at_once_and_a_program_may_go_on(
    name: str, printed: str, tmp_path: Path
) -> None:
    program = tmp_path / name
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, printed)
    assert done.stderr == "lvllm: the reason\n"
