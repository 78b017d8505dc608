"""Processes of vLLM that end without taking their interpreter apart."""

import re
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
        ("says", 1, ["a line", "a line"]),
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


@pytest.mark.parametrize(("how", "status"), [("exits", 3), ("says", 1)])
def test_a_users_own_process_ends_as_python_ends_it(how: str, status: int) -> None:
    child = ended("Process-1", how)
    assert child.stdout == "worked\nexit handler\ntaken apart\n"
    assert child.stderr == ("a line\n" if how == "says" else "")
    assert child.returncode == status


PROGRAM = """
import atexit, sys
from lvllm.faults.leaving import end_in_a_line, leave_with_the_error
atexit.register(print, "exit handler")
try:
    try:
        {statement}
    except (Exception, SystemExit):
        leave_with_the_error()
        raise
finally:
    print("not left")
"""


@pytest.mark.parametrize(
    ("name", "printed"),
    [("vllm", "exit handler\n"), ("program.py", "not left\nexit handler\n")],
)
@pytest.mark.parametrize(
    ("statement", "status", "says"),
    [
        ("end_in_a_line('lvllm: the reason')", 1, r"lvllm: the reason\n"),
        ("sys.exit('a line')", 1, r"a line\n"),
        ("sys.exit(3)", 3, ""),
        ("raise ValueError('the reason')", 1, r"Traceback (.+\n)+ValueError: the reason\n"),
    ],
)
def test_a_command_leaves_at_once_and_a_program_may_go_on(
    name: str, printed: str, statement: str, status: int, says: str, tmp_path: Path
) -> None:
    program = tmp_path / name
    program.write_text(PROGRAM.format(statement=statement))
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (status, printed)
    assert re.fullmatch(says, done.stderr), done.stderr
