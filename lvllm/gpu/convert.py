"""Converts experts from the engine's order and format to plain matrices, in plain PyTorch.

The engine keeps tiles of 64 rows, transposed in units of four bytes (`engine.tiles`), in 4, 8 or 16
bits. The kernels of a GPU read them as they are; this is for the other devices.
"""

from collections.abc import Mapping
from typing import Any

import torch

from lvllm.engine.dequantize import values
from lvllm.engine.expert_layer import ExpertLayer
from lvllm.engine.ops import raw_ops
from lvllm.engine.tiles import WEIGHT_UNIT, from_tiles
from lvllm.engine.weight_formats import BLOCK_FORMATS, GROUPED

__all__ = ["convert"]


def convert(
    layer: ExpertLayer,
    tensors: Mapping[str, torch.Tensor],
    name: str,
    experts: range,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Convert "w13" or "w2" of some experts -> [len(experts), rows, columns] of `dtype`.

    Args:
        layer: the layer of the tensors.
        tensors: copies of `layer.tensors`, in the same order, on any one device.
        name: "w13", which has the gate rows and then the up rows, also if these are in w3; or "w2".
        experts: consecutive experts of `tensors`.
        dtype: bfloat16 or float16. Weight and scale are multiplied in float32, and then rounded.
    """
    found = _convert(layer, tensors, name, experts, dtype)
    if name == "w13" and layer.w3_format is not None:
        return torch.cat((found, _convert(layer, tensors, "w3", experts, dtype)), dim=1)
    return found


def _convert(
    layer: ExpertLayer,
    tensors: Mapping[str, torch.Tensor],
    name: str,
    experts: range,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The same of one tensor and its scales."""
    part = {
        suffix: tensors[name + suffix][experts.start : experts.stop]
        for suffix in ("", "_scale", "_zero", "_global_scale")
        if name + suffix in tensors
    }
    parts = layer.parts if name == "w13" else 1
    format = layer.format_of(name)
    rows: dict[str, Any] = {"format": format}
    if format in BLOCK_FORMATS:
        rows[""] = part[""].cpu().clone()
        raw_ops.restore_blocks(format, rows[""], parts)
    else:
        rows[""] = from_tiles(part[""], parts, WEIGHT_UNIT)
    for suffix in ("_scale", "_zero"):
        if suffix in part:
            tensor = part[suffix]
            # Group scales are in tiles like the weights.
            rows[suffix] = (
                from_tiles(tensor, parts, tensor.element_size())
                if tensor.dim() == 3 and format != "fp8"
                else tensor
            )
    if "_global_scale" in part:
        rows["_global_scale"] = part["_global_scale"]
    if format in GROUPED:
        rows["group_size"] = layer.group_size or None
    device = str(part[""].device)
    matrices = [values(rows, "", expert, device).to(dtype) for expert in range(len(part[""]))]
    return torch.stack(matrices)
