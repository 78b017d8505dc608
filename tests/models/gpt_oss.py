"""gpt-oss in OpenAI's own packing of mxfp4, and the same values in float32 as its reference."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.models.quantize import Tensors, mxfp4


def pack(folder: Path, out: Path) -> tuple[Path, Path]:
    """Write the packed form of the plain checkpoint in `folder`, and its values in float32.

    Both folders are returned. In the plain form, a projection of the experts is
    [E, inputs, outputs]. In the packed form, its blocks are [E, outputs, inputs / 32, 16], and its
    scales are [E, outputs, inputs / 32].
    """
    quantized, values = out / "quantized", out / "values"
    packed: Tensors = {}
    plain: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if re.search(r"\.experts\.(gate_up|down)_proj$", name):
            experts = [mxfp4(expert.t().float()) for expert in tensor]
            plain[name] = torch.stack([value.t() for _, value in experts])
            for suffix, key in (("blocks", "weight_packed"), ("scales", "weight_scale")):
                packed[f"{name}_{suffix}"] = torch.stack([stored[key] for stored, _ in experts])
            packed[f"{name}_blocks"] = packed[f"{name}_blocks"].unflatten(-1, (-1, 16))
        else:
            packed[name] = tensor
            plain[name] = tensor.float()
    config = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    for target, data, changes in (
        (quantized, packed, {"quantization_config": method}),
        (values, plain, {}),
    ):
        shutil.copytree(folder, target)
        save_file(
            {name: tensor.contiguous() for name, tensor in data.items()},
            target / "model.safetensors",
            {"format": "pt"},
        )
        (target / "config.json").write_text(json.dumps(config | changes))
    return quantized, values
