"""Crashes that end a process at once, and say where Python was."""

import subprocess
import sys

import pytest

CHILD = f"{__name__.rpartition('.')[0]}.crashing_child"


@pytest.mark.parametrize("name", ["VllmWorker-0", "Process-1"])
def test_a_crash_of_vllms_process_shows_python_and_runs_no_other_handler(name: str) -> None:
    """A user's own process keeps the handler of tvm_ffi, which vLLM imports."""
    done = subprocess.run(
        [sys.executable, "-m", CHILD, name], capture_output=True, text=True, timeout=60
    )
    ours = name.startswith("Vllm")
    assert ("Fatal Python error: Segmentation fault" in done.stderr) is ours
    assert ("crashing_child.py" in done.stderr) is ours
    assert ("Segfault encountered" in done.stderr) is not ours
    assert done.returncode == 1, "the child did not end by SIGSEGV"
