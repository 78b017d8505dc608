"""One copy of the weights: the peak resident memory of loading and running a model of 2 GiB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from tests.e2e.generate import ONE_PROCESS, ROOT
from tests.models.make import ARCHITECTURES, COMMON

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


@pytest.fixture
def large_model(tmp_path: Path) -> Path:
    """A Qwen3-MoE checkpoint of 2.3 GB, nearly all of it experts, in shards of 512 MB."""
    config_class, fields = ARCHITECTURES["qwen3_moe"]
    wide = {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 64}
    config = getattr(transformers, config_class)(
        **{**COMMON, **fields, **wide, "num_hidden_layers": 11, "mlp_only_layers": []}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "large", max_shard_size="512MB")
    return tmp_path / "large"


def test_peak_is_the_weights_and_small_change(large_model: Path) -> None:
    weights = sum(file.stat().st_size for file in large_model.glob("*.safetensors"))
    assert weights >= 2 * GIB
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(large_model)],
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
    assert peak <= weights + 1.5 * GIB
