"""One copy of the weights: the peak resident memory of loading and running a model of 2 GiB."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.loading import make
from tests.e2e.generate import ONE_PROCESS, ROOT

GIB = 1 << 30

# Loads the model without worker processes, computes two tokens, prints the peak in bytes. Not from
# getrusage: its peak begins with that of the process that started this one.
CHILD = """
import re, sys
from pathlib import Path
from tests.e2e.generate import DEFAULTS
from vllm import LLM, SamplingParams
llm = LLM(**{**DEFAULTS, "model": sys.argv[1]})
llm.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(max_tokens=2, detokenize=False))
kib = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print("peak", int(kib) * 1024)
"""


@pytest.mark.parametrize("experts", ["bf16", "fp8"])
def test_peak_is_the_weights_and_small_change(experts: str, tmp_path: Path) -> None:
    """All weights are in one file, which alone is more than what the peak may exceed them by."""
    make(tmp_path, int(2.2 * GIB), shard=1 << 60, experts=experts)
    (file,) = tmp_path.glob("*.safetensors")
    weights = file.stat().st_size
    assert weights >= 2 * GIB
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"LVLLM_MOE_NUMA_ENABLED": "1"} | ONE_PROCESS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "LvLLM: experts on lk" in done.stdout
    lines = done.stdout.splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("peak "))
    print(json.dumps({"weights_gib": weights / GIB, "peak_gib": peak / GIB}))
    assert re.search(r"LvLLM: read \d", done.stdout)
    assert peak <= weights + 1.5 * GIB
