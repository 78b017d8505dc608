"""Both files of the whole model's benchmark hold the same weights."""

from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.whole_model.shape import Shape
from benchmarks.whole_model.write import EXPERT_PARTS, GGUF, NORMS, PROJECTIONS, write

TINY = Shape(
    layers=2, hidden=64, heads=4, kv_heads=2, head_dim=32, experts=3, top_k=2, intermediate=32,
    vocabulary=96,
)  # fmt: skip


def test_gguf_and_safetensors_agree(tmp_path: Path) -> None:
    write(TINY, tmp_path)
    given: dict[str, torch.Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        given |= load_file(file)
    names = {
        "token_embd": "model.embed_tokens",
        "output": "lm_head",
        "output_norm": "model.norm",
    }
    for i in range(TINY.layers):
        names |= {f"blk.{i}.{b}": f"model.layers.{i}.{a}" for a, b in (NORMS | PROJECTIONS).items()}
        names[f"blk.{i}.ffn_gate_inp"] = f"model.layers.{i}.mlp.gate"
    for tensor in gguf.GGUFReader(tmp_path / GGUF).tensors:
        got = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        name = tensor.name.removesuffix(".weight")
        if name in names:
            wanted = [given.pop(f"{names[name]}.weight")]
            bound = 0.01  # 8 bits
        else:
            part = next(key for key, value in EXPERT_PARTS.items() if name.endswith(value))
            experts = f"model.layers.{name.split('.')[1]}.mlp.experts"
            wanted = [given.pop(f"{experts}.{i}.{part}.weight") for i in range(TINY.experts)]
            bound = 0.12  # 4 bits
        want = torch.cat(wanted).float().numpy()
        assert np.linalg.norm(got.reshape(want.shape) - want) <= bound * np.linalg.norm(want), name
    assert not given
