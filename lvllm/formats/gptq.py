"""Experts of symmetric GPTQ checkpoints, and of AutoRound's in that packing: codes packed along the
inputs.

A packed expert has as many bytes as the engine's: it is turned in place when all are loaded.
"""

from typing import Any

import torch
from torch.nn import Module
from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override

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

__all__ = ["Gptq", "find"]


def find(quant_config: Any, layer: Any, prefix: str) -> ExpertFormat | None:
    """Experts of a GPTQ checkpoint; those that it leaves alone are plain."""
    if not isinstance(quant_config, AutoGPTQConfig):
        return None
    if get_dynamic_override(quant_config, layer_name=prefix) is False:
        return Unquantized()

    def override(key: str, default: Any) -> Any:
        return get_dynamic_override(quant_config, prefix, key, default)

    if override("desc_act", quant_config.desc_act):
        raise ValueError(f"{prefix}: GPTQ with act-order (desc_act=true) is not supported yet")
    if not override("sym", quant_config.is_sym):
        raise ValueError(f"{prefix}: GPTQ with zero points (sym=false) is not supported yet")
    bits = override("bits", quant_config.weight_bits)
    group_size = override("group_size", quant_config.group_size)
    if bits == 8 and group_size != -1:
        raise ValueError(f"{prefix}: 8-bit experts must have one scale a row (group_size=-1)")
    return Gptq(bits, group_size)


class Gptq:
    """qweight int32 [E, columns * bits / 32, rows], scales [E, groups, rows]; qzeros are all the
    same and g_idx goes up by one every group: both are read and left.
    """

    def __init__(self, bits: int, group_size: int) -> None:
        self.bits = bits
        self.group_size = group_size

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        how = FusedMoeWeightScaleSupported.GROUP.value
        more = {"is_transposed": True, "quant_method": how}
        per_word = 32 // self.bits
        for name, parts, rows, columns in shape.matrices:
            size = columns if self.group_size == -1 else self.group_size
            if columns % size != 0 or columns % per_word != 0 or rows % (8 * parts) != 0:
                raise ValueError(
                    f"{name} has {rows} x {columns} weights in this process, wanted multiples of"
                    f" {8 * parts} and of {size} and {per_word}"
                )
            stored = torch.uint8 if self.bits == 4 else torch.int8
            codes = bank.allocate(
                (shape.experts, rows, columns * self.bits // 8), stored, parts=parts
            )
            packed = codes.view(torch.int32).view(shape.experts, columns // per_word, rows)
            add_parameter(layer, f"{name}_qweight", packed, attributes, **more)
            groups = columns // size
            scale = torch.full((shape.experts, groups, rows), torch.nan, dtype=torch.float32)
            add_parameter(layer, f"{name}_scales", scale, attributes, **more)
            zero = torch.empty((shape.experts, groups, rows // per_word), dtype=torch.int32)
            add_parameter(layer, f"{name}_qzeros", zero, attributes, **more)
            g_idx = torch.empty((shape.experts, columns), dtype=torch.int32)
            add_parameter(layer, f"{name}_g_idx", g_idx, attributes, **more)

    def finalize(self, layer: Any) -> ExpertLayer:
        turn = packing.gptq_int4 if self.bits == 4 else packing.gptq_int8
        scales: list[torch.Tensor] = []
        codes = []
        for name, scale in zip(("w13", "w2"), check_scales(layer, "scales"), strict=True):
            packed = getattr(layer, f"{name}_qweight").data
            experts, words, rows = packed.shape
            dtype = torch.uint8 if self.bits == 4 else torch.int8
            turned = packed.view(dtype).view(experts, rows, words * 4)
            for expert in range(experts):
                turned[expert].copy_(turn(packed[expert]))
            codes.append(turned)
            scales.append(torch.stack([packing.group_scale(of_expert) for of_expert in scale]))
        if self.bits == 8:
            w13_scale, w2_scale = (scale.squeeze(-1) for scale in scales)
            return engine_layer(layer, "int8", *codes, w13_scale=w13_scale, w2_scale=w2_scale)
        w13_scale, w2_scale = map(narrow, scales)
        return engine_layer(
            layer,
            "int4",
            *codes,
            w13_scale=w13_scale,
            w2_scale=w2_scale,
            group_size=self.group_size,
        )
