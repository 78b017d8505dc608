"""INT4 while loading: the peak is the runtime size and two layers, not the checkpoint's size."""

import json
from pathlib import Path

import torch
import transformers

from tests.e2e.generate import DEFAULTS, ONE_PROCESS, call
from tests.e2e.test_memory import peak
from tests.models.make import ARCHITECTURES, COMMON

MIB = 1 << 20
LAYERS = 9


def run(small: str, large: str, result: str) -> None:
    """In a forked process: write its peak after the small model and after the large one."""
    from vllm import LLM, SamplingParams

    LLM(**{**DEFAULTS, "model": small})
    peaks = {"small": peak()}
    llm = LLM(**{**DEFAULTS, "model": large})
    llm.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(max_tokens=2, detokenize=False))
    Path(result).write_text(json.dumps(peaks | {"large": peak()}))


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
    result = tmp_path / "peaks"
    models = (str(tmp_path / "small"), str(tmp_path / "large"))
    environment = ONE_PROCESS | {"LVLLM_MOE_USE_WEIGHT": "INT4"}
    with (tmp_path / "log").open("w") as log:
        call(run, *models, str(result), log=log, environment=environment)
    peaks = json.loads(result.read_text())
    grown, layer = peaks["large"] - peaks["small"], weights / LAYERS
    runtime = weights * (0.5 + 2 / 32) / 2
    seen = {"weights": weights, "runtime": runtime, "grown": grown}
    print(json.dumps({name: round(value / MIB) for name, value in seen.items()}))
    # A file of 200 MB may be mapped, and pages of it count.
    assert grown <= runtime + 2 * layer + 300 * MIB
