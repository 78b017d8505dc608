"""e4m3 experts of vLLM's "fp8" checkpoints (DeepSeek, Qwen3, MiniMax, GLM).

128 x 128 weights share a float32 scale, or all weights of a projection do. Activations are not
quantised, whatever the checkpoint says: static input scales are loaded and ignored.
"""

from typing import Any, Literal

import torch
from torch.nn import Module

from lvllm.engine import weight_formats
from lvllm.formats.base import ExpertFormat, Shape, add_parameter, add_weights, check_scales
from lvllm.formats.descriptor import Descriptor, Stored
from lvllm.formats.unquantized import Unquantized
from lvllm.units import ceil_div

__all__ = ["BLOCK", "DESCRIPTOR", "Fp8", "Scales", "find"]

BLOCK = [weight_formats.BLOCK, weight_formats.BLOCK]
"""Rows and columns that share a scale; the engine computes no other blocks."""

Scales = Literal["block", "channel", "tensor"]

DESCRIPTOR = Descriptor(
    "fp8",
    stored=lambda section, module: Stored(bits=8),
    quantizations=("fp8",),
    quant_methods=("fp8",),
    exceptions=("ignored_layers", "modules_to_not_convert"),
    scales=("scale", "scale_inv"),
    input_scales=("input_scale",),
)


def find(quant_config: Any, layer: Any, prefix: str) -> ExpertFormat | None:
    """Experts of an fp8 checkpoint; those that it leaves alone are not quantised."""
    if not DESCRIPTOR.describes(quant_config):
        return None
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    if is_layer_skipped(
        prefix=prefix,
        ignored_layers=quant_config.ignored_layers,
        fused_mapping=quant_config.packed_modules_mapping,
        match_mode=quant_config.ignored_layers_match_mode,
    ):
        return Unquantized()
    if quant_config.store_dtype is not None:
        raise ValueError(f"{prefix}: store_dtype {quant_config.store_dtype!r} is not supported")
    block = quant_config.weight_block_size
    if block not in (None, BLOCK):
        raise ValueError(f"{prefix}: weight_block_size is {block}, must be [128, 128]")
    static = quant_config.activation_scheme == "static"
    if block is None:
        return Fp8("tensor", "weight_scale", static_inputs=static)
    return Fp8("block", "weight_scale_inv", static_inputs=static)


class Fp8(ExpertFormat):
    """w13_weight and w2_weight in e4m3fn, and their scales.

    Args:
        scales: what shares a scale. "block": w13_SCALE is [E, 2 * I / 128, ceil(H / 128)], and w2
            alike; "channel": w13_SCALE is [E, 2I, 1], w2 [E, H, 1]; "tensor": [E, 2] for gate and
            up, and [E].
        scale_name: SCALE, weight_scale or weight_scale_inv.
        static_inputs: whether the checkpoint has input_scale, a number for each projection.
    """

    bits = 8

    def __init__(self, scales: Scales, scale_name: str, *, static_inputs: bool) -> None:
        self.scales = scales
        self.scale_name = scale_name
        self.static_inputs = static_inputs

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        if self.scales == "block" and shape.intermediate % weight_formats.BLOCK != 0:
            raise ValueError(
                f"gate and up have {shape.intermediate} rows in this process, no multiple of the"
                f" {weight_formats.BLOCK} that share a scale: use another tensor-parallel size, or"
                " expert parallelism"
            )
        add_weights(layer, shape, "weight", torch.float8_e4m3fn, attributes)
        for name, parts, rows, columns in shape.matrices:
            size = {
                "block": (
                    ceil_div(rows, weight_formats.BLOCK),
                    ceil_div(columns, weight_formats.BLOCK),
                ),
                "channel": (rows, 1),
                "tensor": (parts,) if name == "w13" else (),
            }[self.scales]
            scale = torch.full((shape.experts, *size), torch.nan, dtype=torch.float32)
            how = {"quant_method": self.scales}
            add_parameter(layer, f"{name}_{self.scale_name}", scale, attributes, **how)
            if self.static_inputs:
                unused = torch.empty(shape.experts)
                what = {"quant_method": "tensor", "optional": True}
                add_parameter(layer, f"{name}_input_scale", unused, attributes, **what)

    def tensors(self, layer: Any) -> dict[str, Any]:
        w13, w2 = layer.w13_weight.data, layer.w2_weight.data
        scales = [
            self._engine_scale(scale, weight.shape[1])
            for scale, weight in zip(check_scales(layer, self.scale_name), (w13, w2), strict=True)
        ]
        return {
            "format": "fp8",
            "w13": w13,
            "w2": w2,
            "w13_scale": scales[0],
            "w2_scale": scales[1],
        }

    def _engine_scale(self, scale: torch.Tensor, rows: int) -> torch.Tensor:
        """Scales in the engine's shape: those of blocks as they are, all others [E, rows]."""
        if self.scales == "block":
            return scale
        scale = scale.view(len(scale), -1)
        return scale.repeat_interleave(rows // scale.shape[1], dim=1)
