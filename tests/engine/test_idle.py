"""What the engine's threads do between calls and around them, counted and not timed."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lvllm import engine
from lvllm.engine import ExpertLayer

pytestmark = pytest.mark.alone


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    yield
    engine.configure()


def tiny_layer() -> ExpertLayer:
    w13, w2 = torch.randn(4, 64, 64), torch.randn(4, 64, 32)
    return ExpertLayer(format="bf16", w13=w13.bfloat16(), w2=w2.bfloat16())


@pytest.mark.parametrize("options", [{}, {"power_saving": True}, {"own_cores": True}])
def test_idle_threads_burn_less_than_one_percent_of_a_core(options: dict[str, bool]) -> None:
    """CPU time of the whole process, from 100 ms after the last of some calls."""
    engine.configure(**options)  # type: ignore[arg-type]
    layer, x = tiny_layer(), torch.randn(3, 64).bfloat16()
    ids, weights = torch.tensor([[0, 1], [2, 3], [3, -1]]), torch.rand(3, 2)
    for _ in range(50):
        layer(x, ids, weights)
    time.sleep(0.1)
    start, burnt = time.monotonic(), time.process_time()
    time.sleep(1.0)
    assert time.process_time() - burnt < 0.01 * (time.monotonic() - start)


# The caller stays on one CPU: when it is moved, the worker whose core it takes is moved too, which
# is a sched_setaffinity. A thread that has slept has done what threads do when they begin.
HOT_LOOP = """
import gc, os, time
from pathlib import Path
import torch
from tests.engine.test_idle import tiny_layer
from lvllm import engine
engine.configure()
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
layer, x = tiny_layer(), torch.randn(3, 64).bfloat16()
ids, weights = torch.tensor([[0, 1], [2, 3], [3, -1]]), torch.rand(3, 2)
def calls():
    for _ in range(200):
        layer(x, ids, weights)
def slept(thread):
    status = (thread / "status").read_text()
    return int(status.partition("nonvoluntary_ctxt_switches")[0].split()[-1]) > 0
calls()
while not all(slept(thread) for thread in Path("/proc/self/task").iterdir()):
    time.sleep(0.01)
calls()
gc.disable()
os.getppid()
calls()
os.getppid()
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_call_makes_no_system_calls_but_futex(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-qq", "-o", str(trace), sys.executable, "-c", HOT_LOOP]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines()]
    marks = [i for i, line in enumerate(lines) if line.startswith("getppid")]
    hot = lines[marks[-2] + 1 : marks[-1]]
    # A mark that another thread interrupts ends on a line of its own, behind the first.
    assert [line for line in hot if "futex" not in line and "getppid" not in line] == []
