"""e2m1 experts (OCP Microscaling Formats 1.0, and NVIDIA's NVFP4), two weights a byte.

Checkpoints of several makers differ in names alone; `compressed_tensors`, `modelopt` and
`gpt_oss` find them.
"""

from typing import Any

import torch
from torch.nn import Module
from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported

from lvllm.engine import weight_formats
from lvllm.formats.base import ExpertFormat, Shape, add_parameter, add_weights, check_scales

__all__ = ["Mxfp4", "Nvfp4"]

GROUP = FusedMoeWeightScaleSupported.GROUP.value
TENSOR = FusedMoeWeightScaleSupported.TENSOR.value
DUMMY_EXPONENT = 117
"""With --load-format dummy: 2**-10. vLLM makes random numbers of floats alone."""


def add_codes_and_scales(
    layer: Module, shape: Shape, suffix: str, format: str, missing: int, attributes: dict[str, Any]
) -> None:
    """Register the codes, uint8 [E, rows, columns / 2], and weight_scale [E, rows, columns / g],
    filled with the byte `missing`.
    """
    stored = weight_formats.FORMATS[format]
    group = stored.group_size
    assert group is not None
    for name, _, rows, columns in shape.matrices:
        if columns % group != 0:
            raise ValueError(
                f"{name} has {columns} columns in this process, wanted a multiple of {group}"
            )
        scale = torch.full((shape.experts, rows, columns // group), missing, dtype=torch.uint8)
        add_parameter(
            layer,
            f"{name}_weight_scale",
            scale.view(stored.scale[0]),
            attributes,
            quant_method=GROUP,
            dummy_weight_value=DUMMY_EXPONENT if format == "mxfp4" else None,
        )
    add_weights(layer, shape, suffix, torch.uint8, attributes, packed=2)


class Mxfp4(ExpertFormat):
    """Codes; weight_scale: exponents (e8m0) of groups of 32.

    Args:
        suffix: of the codes, weight_packed or weight.
    """

    bits = 4

    def __init__(self, suffix: str) -> None:
        self.suffix = suffix

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        add_codes_and_scales(layer, shape, self.suffix, "mxfp4", 0xFF, attributes)

    def tensors(self, layer: Any) -> dict[str, Any]:
        w13_scale, w2_scale = check_scales(layer, "weight_scale")
        return {
            "format": "mxfp4",
            "w13": getattr(layer, f"w13_{self.suffix}").data,
            "w2": getattr(layer, f"w2_{self.suffix}").data,
            "w13_scale": w13_scale,
            "w2_scale": w2_scale,
        }


class Nvfp4(ExpertFormat):
    """Codes; weight_scale: e4m3 of groups of 16; a float32 for gate, up and down each.

    Args:
        suffix: of the codes, weight_packed or weight.
        global_scale: of the float32, weight_global_scale or weight_scale_2.
        divides: whether weights are divided by it instead of multiplied.
        input_scale: a number for each projection that is read and left: activations are not
            quantised. None if the checkpoint has none.
    """

    bits = 4

    def __init__(
        self, suffix: str, global_scale: str, *, divides: bool, input_scale: str | None
    ) -> None:
        self.suffix = suffix
        self.global_scale = global_scale
        self.divides = divides
        self.input_scale = input_scale

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        add_codes_and_scales(layer, shape, self.suffix, "nvfp4", 0x7F, attributes)
        for name, parts, _, _ in shape.matrices:
            size = (shape.experts, parts) if name == "w13" else (shape.experts,)
            for scale in filter(None, (self.global_scale, self.input_scale)):
                add_parameter(
                    layer,
                    f"{name}_{scale}",
                    torch.full(size, torch.nan, dtype=torch.float32),
                    attributes,
                    quant_method=TENSOR,
                    optional=scale == self.input_scale,
                )

    def tensors(self, layer: Any) -> dict[str, Any]:
        w13_scale, w2_scale = check_scales(layer, "weight_scale")
        w13_global, w2_global = check_scales(layer, self.global_scale)
        return {
            "format": "nvfp4",
            "w13": getattr(layer, f"w13_{self.suffix}").data,
            "w2": getattr(layer, f"w2_{self.suffix}").data,
            "w13_scale": w13_scale,
            "w2_scale": w2_scale,
            "w13_global_scale": 1 / w13_global if self.divides else w13_global,
            "w2_global_scale": 1 / w2_global if self.divides else w2_global,
        }
