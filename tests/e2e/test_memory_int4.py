"""INT4 while loading: the peak is the runtime size and two layers, not the checkpoint's size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from tests.e2e.generate import ONE_PROCESS, ROOT
from tests.models.make import ARCHITECTURES, COMMON

MIB = 1 << 20
LAYERS = 9

# The peak of the process when vLLM is imported and when the model has computed, in bytes. Not from
# getrusage: its peak begins with that of the process that started this one.
CHILD = """
import re, sys
from pathlib import Path
from tests.e2e.generate import DEFAULTS
from vllm import LLM, SamplingParams
def peak(name):
    kib = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
    print(name, int(kib) * 1024)
LLM(**{**DEFAULTS, "model": sys.argv[1]})
peak("small")
llm = LLM(**{**DEFAULTS, "model": sys.argv[2]})
llm.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(max_tokens=2, detokenize=False))
peak("large")
"""


def make(folder: Path, layers: int, experts: int) -> int:
    """A Qwen3-MoE checkpoint of that many layers of experts of 3 MiB; returns its bytes."""
    config_class, fields = ARCHITECTURES["qwen3_moe"]
    wide = {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": experts}
    config = getattr(transformers, config_class)(
        **{**COMMON, **fields, **wide, "num_hidden_layers": layers, "mlp_only_layers": []}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_peak_of_int4_is_the_runtime_size_and_two_layers(tmp_path: Path) -> None:
    make(tmp_path / "small", 1, 4)
    weights = make(tmp_path / "large", LAYERS, 64)
    assert weights > 1700 * MIB
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large")],
        cwd=ROOT,
        env=os.environ
        | {"LVLLM_MOE_NUMA_ENABLED": "1", "LVLLM_MOE_USE_WEIGHT": "INT4"}
        | ONE_PROCESS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    peaks = {line[0]: int(line[1]) for line in lines if line and line[0] in ("small", "large")}
    grown, layer = peaks["large"] - peaks["small"], weights / LAYERS
    runtime = weights * (0.5 + 2 / 32) / 2
    seen = {"weights": weights, "runtime": runtime, "grown": grown}
    print(json.dumps({name: round(value / MIB) for name, value in seen.items()}))
    # A file of 200 MB may be mapped, and pages of it count.
    assert grown <= runtime + 2 * layer + 300 * MIB
