"""A checkpoint's experts quantised as the formats that people download, and the same values in
float32 as the reference for them.

A scheme quantises one projection of one expert, [rows, columns], to the tensors that stand in the
checkpoint by their suffix, and to the values that those mean.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
EXPERT_WEIGHT = re.compile(r"\.experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
FP8_LARGEST = 448.0


@dataclass(frozen=True)
class Scheme:
    """How experts are quantised, and what config.json says of it."""

    config: dict[str, Any]
    quantize: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
    ignored: str = "ignored_layers"
    """The key of `config` that lists what is not quantised."""


def quantize(folder: Path, scheme: Scheme, out: Path) -> tuple[Path, Path]:
    """Writes the quantised checkpoint and its values in float32; returns both folders."""
    quantized, values = out / "quantized", out / "values"
    tensors = load_file(folder / "model.safetensors")
    packed: Tensors = {}
    plain: Tensors = {}
    linear = []
    for name, tensor in tensors.items():
        if EXPERT_WEIGHT.search(name):
            stored, value = scheme.quantize(tensor.float())
            stem = name.removesuffix(".weight")
            packed |= {f"{stem}.{suffix}": data.contiguous() for suffix, data in stored.items()}
            plain[name] = value
        else:
            packed[name] = tensor
            plain[name] = tensor.float()
            if tensor.dim() == 2:
                linear.append(name.removesuffix(".weight"))
    config = json.loads((folder / "config.json").read_text())
    for target, data, changes in (
        (quantized, packed, {"quantization_config": {**scheme.config, scheme.ignored: linear}}),
        (values, plain, {}),
    ):
        shutil.copytree(folder, target)
        save_file(data, target / "model.safetensors", {"format": "pt"})
        (target / "config.json").write_text(json.dumps(config | changes))
    return quantized, values


def to_fp8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 of [..., n] by one float32 scale [..., 1] for the last dimension."""
    scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-12) / FP8_LARGEST
    return (values / scale).to(torch.float8_e4m3fn), scale


def fp8_blocks(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """128 x 128 blocks, the last ones cut."""
    rows, columns = weight.shape
    down, across = -(-rows // 128), -(-columns // 128)
    padded = torch.zeros(down * 128, across * 128)
    padded[:rows, :columns] = weight
    blocks = padded.view(down, 128, across, 128).transpose(1, 2).reshape(down, across, -1)
    code, scale = to_fp8(blocks)

    def whole(data: torch.Tensor) -> torch.Tensor:
        data = data.view(down, across, 128, 128).transpose(1, 2).reshape(padded.shape)
        return data[:rows, :columns].contiguous()

    return (
        {"weight": whole(code), "weight_scale_inv": scale.squeeze(-1)},
        whole(code.float() * scale),
    )


def fp8_tensor(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """One scale, and an input scale that is read and not used."""
    code, scale = to_fp8(weight.flatten())
    return (
        {
            "weight": code.view(weight.shape),
            "weight_scale": scale.squeeze(),
            "input_scale": torch.tensor(0.02),
        },
        (code.float() * scale).view(weight.shape),
    )


SCHEMES = {
    "fp8_blocks": Scheme(
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
        fp8_blocks,
    ),
    "fp8_tensor": Scheme(
        {"quant_method": "fp8", "activation_scheme": "static"},
        fp8_tensor,
    ),
}
