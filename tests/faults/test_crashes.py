"""Crashes that end a process at once, and say where Python was."""

import subprocess
import sys

import pytest

CHILD = f"{__name__.rpartition('.')[0]}.crashing_child"


def meet(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program that crashes."""
    return subprocess.run(
        [sys.executable, "-m", CHILD, *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("name", ["VllmWorker-0", "Process-1"])
def test_a_crash_of_vllms_process_shows_python_and_runs_no_other_handler(name: str) -> None:
    """A user's own process keeps the handler of tvm_ffi, which vLLM imports."""
    done = meet(name)
    ours = name.startswith("Vllm")
    assert ("Fatal Python error: Segmentation fault" in done.stderr) is ours
    assert ("crashing_child.py" in done.stderr) is ours
    assert ("Segfault encountered" in done.stderr) is not ours
    assert done.returncode == 1, "the child did not end by SIGSEGV"


def test_a_crash_shows_python_where_standard_error_was_replaced() -> None:
    done = meet("VllmWorker-0", "replaced")
    assert "Fatal Python error: Segmentation fault" in done.stderr
    assert done.returncode == 1, "the child did not end by SIGSEGV"


def test_a_closed_standard_error_is_no_fault() -> None:
    done = subprocess.run(
        ["bash", "-c", f"exec {sys.executable} -m {CHILD} VllmWorker-0 2>&-"], timeout=60
    )
    assert done.returncode == 1, "the child did not end by SIGSEGV"
