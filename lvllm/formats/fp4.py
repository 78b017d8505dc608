"""e2m1 experts (OCP Microscaling Formats 1.0, and NVIDIA's NVFP4), two weights in a byte.

The checkpoints of several makers differ in their tensors' names alone; `compressed_tensors`,
`modelopt` and `gpt_oss` find them.
"""

from typing import Any

import torch
from torch.nn import Module

from lvllm.engine import weight_formats
from lvllm.formats.base import ExpertFormat, Shape, add_parameter, add_weights, check_scales

__all__ = ["Mxfp4", "Nvfp4"]

DUMMY_EXPONENT = 117
"""The scale 2**-10, for --load-format dummy: vLLM makes random numbers for floats only."""


def add_codes_and_scales(
    layer: Module, shape: Shape, suffix: str, format: str, missing: int, attributes: dict[str, Any]
) -> None:
    """Register the codes, uint8 [E, rows, columns / 2], and weight_scale [E, rows, groups].

    The scales begin with the byte `missing`, which is NaN and tells of scales that never came.
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
            quant_method="group",
            dummy_weight_value=DUMMY_EXPONENT if format == "mxfp4" else None,
        )
    add_weights(layer, shape, suffix, torch.uint8, attributes, packed=2)


class Mxfp4(ExpertFormat):
    """Codes, and weight_scale: one exponent (e8m0) for each group of 32.

    Args:
        suffix: what the codes are called, weight_packed or weight.
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
    """Codes, weight_scale: an e4m3 for each group of 16, and a float32 for each of gate, up, down.

    Args:
        suffix: what the codes are called, weight_packed or weight.
        global_scale: what the float32 is called, weight_global_scale or weight_scale_2.
        divides: whether weights are divided by the float32 instead of multiplied.
        input_scale: what a number for each projection is called that is loaded and ignored, since
            activations are not quantised. None if the checkpoint has none.
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
                    quant_method="tensor",
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
