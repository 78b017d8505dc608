"""Experts of AutoAWQ checkpoints: 4-bit codes packed along the outputs, in an interleaved order.

A packed expert has as many bytes as the engine's: it is turned in place when all are loaded.
"""

from typing import Any

import torch
from torch.nn import Module
from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

from lvllm import bank
from lvllm.engine import ExpertLayer
from lvllm.formats import packing
from lvllm.formats.base import (
    ExpertFormat,
    Shape,
    add_parameter,
    check_scales,
    engine_layer,
    narrow,
)
from lvllm.formats.unquantized import Unquantized

__all__ = ["Awq", "find"]


def find(quant_config: Any, layer: Any, prefix: str) -> ExpertFormat | None:
    """Experts of an AutoAWQ checkpoint; those that it leaves alone are plain."""
    if not isinstance(quant_config, AutoAWQConfig):
        return None
    if is_layer_skipped(prefix, quant_config.modules_to_not_convert, match_mode="substring"):
        return Unquantized()
    return Awq(quant_config.group_size, zero_points=quant_config.zero_point)


class Awq:
    """qweight int32 [E, columns, rows / 8], scales [E, groups, rows] and, packed like the weights,
    qzeros [E, groups, rows / 8].
    """

    def __init__(self, group_size: int, *, zero_points: bool) -> None:
        self.group_size = group_size
        self.zero_points = zero_points

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        how = FusedMoeWeightScaleSupported.GROUP.value
        more = {"is_transposed": True, "quant_method": how}
        for name, parts, rows, columns in shape.matrices:
            size = columns if self.group_size == -1 else self.group_size
            if rows % (8 * parts) != 0 or columns % size != 0:
                raise ValueError(
                    f"{name} has {rows} x {columns} weights in this process, wanted multiples of"
                    f" {8 * parts} and {size}"
                )
            codes = bank.allocate((shape.experts, rows, columns // 2), torch.uint8, parts=parts)
            packed = codes.view(torch.int32).view(shape.experts, columns, rows // 8)
            add_parameter(layer, f"{name}_qweight", packed, attributes, **more)
            groups = columns // size
            scale = torch.full((shape.experts, groups, rows), torch.nan, dtype=torch.float32)
            add_parameter(layer, f"{name}_scales", scale, attributes, **more)
            if self.zero_points:
                zero = torch.zeros((shape.experts, groups, rows // 8), dtype=torch.int32)
                add_parameter(layer, f"{name}_qzeros", zero, attributes, **more)

    def finalize(self, layer: Any) -> ExpertLayer:
        more: dict[str, Any] = {}
        codes = []
        for name, scale in zip(("w13", "w2"), check_scales(layer, "scales"), strict=True):
            packed = getattr(layer, f"{name}_qweight").data
            experts, columns, words = packed.shape
            rows = packed.view(torch.uint8).view(experts, words * 8, columns // 2)
            for expert in range(experts):
                rows[expert].copy_(packing.awq_int4(packed[expert]))
            codes.append(rows)
            more[f"{name}_scale"] = narrow(torch.stack([packing.group_scale(s) for s in scale]))
            if self.zero_points:
                zeros = getattr(layer, f"{name}_qzeros").data
                more[f"{name}_zero"] = torch.stack([packing.awq_zero(zero) for zero in zeros])
        return engine_layer(layer, "int4", *codes, group_size=self.group_size, **more)
