"""Models that do not fit, refused before anything of them is read."""

import re
from pathlib import Path

import transformers

from tests.e2e.server import fail_to_serve
from tests.machine.test_memory_need import Tensors, write_sparse
from tests.models.make import ARCHITECTURES, COMMON

HIDDEN, INTERMEDIATE, EXPERTS, LAYERS = 4096, 4096, 256, 32


def huge_model(folder: Path) -> float:
    """A Qwen3-MoE checkpoint of 768 GiB that takes no disk: sparse files. Its experts' GiB."""
    config_class, fields = ARCHITECTURES["qwen3_moe"]
    sizes = {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTERMEDIATE,
        "num_experts": EXPERTS,
        "num_hidden_layers": LAYERS,
        "mlp_only_layers": [],
        "architectures": ["Qwen3MoeForCausalLM"],
        "dtype": "bfloat16",
    }
    getattr(transformers, config_class)(**{**COMMON, **fields, **sizes}).save_pretrained(folder)
    shapes = {
        "gate_proj": [INTERMEDIATE, HIDDEN],
        "up_proj": [INTERMEDIATE, HIDDEN],
        "down_proj": [HIDDEN, INTERMEDIATE],
    }
    for layer in range(LAYERS):
        tensors: Tensors = {
            f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": ("BF16", shape)
            for expert in range(EXPERTS)
            for name, shape in shapes.items()
        }
        write_sparse(folder / f"model-{layer:05}.safetensors", tensors)
    return LAYERS * EXPERTS * 3 * HIDDEN * INTERMEDIATE * 2 / (1 << 30)


def test_a_huge_model_is_refused_with_the_numbers(tmp_path: Path) -> None:
    experts = huge_model(tmp_path)
    arguments = ("--skip-tokenizer-init", "--kv-cache-memory-bytes", str(3 << 30))
    code, errors = fail_to_serve(str(tmp_path), "--max-model-len", "64", *arguments)
    last = errors.strip().splitlines()[-1]
    assert code == 1
    assert re.fullmatch(
        rf"lvllm: the model takes {experts + 3:.2f} GiB of memory \(experts {experts:.2f} GiB,"
        r" other weights 0\.00 GiB, KV cache 3\.00 GiB\), \d+\.\d\d GiB are free:"
        r" no setting makes it fit; with LVLLM_MOE_USE_WEIGHT=INT4 and no KV cache it takes"
        rf" {experts * 4.5 / 16:.2f} GiB",
        last,
    )
    assert "Traceback" not in errors
