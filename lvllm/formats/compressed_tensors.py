"""Experts of compressed-tensors checkpoints: 4- and 8-bit integers, fp8, nvfp4 and mxfp4.

Weights alone are taken as quantised: what a checkpoint says of its activations is left.
"""

from typing import Any

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch.nn import Module
from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)

from lvllm import weights
from lvllm.engine import ExpertLayer
from lvllm.formats.base import (
    ExpertFormat,
    Shape,
    add_parameter,
    add_weights,
    check_scales,
    engine_layer,
    narrow,
)
from lvllm.formats.fp4 import Mxfp4, Nvfp4
from lvllm.formats.fp8 import Fp8, Scales
from lvllm.formats.packing import compressed_zero
from lvllm.formats.unquantized import Unquantized

__all__ = ["Int8", "PackedInts", "find"]


def find(quant_config: Any, layer: Any, prefix: str) -> ExpertFormat | None:
    """Experts of a compressed-tensors checkpoint; those that it leaves alone are plain."""
    if not isinstance(quant_config, CompressedTensorsConfig):
        return None
    scheme = _scheme(quant_config, layer, prefix)
    if scheme is None:
        return Unquantized()
    how: QuantizationArgs = scheme["weights"]
    inputs: QuantizationArgs | None = scheme.get("input_activations")
    static = inputs is not None and not inputs.dynamic
    match scheme.get("format"):
        case CompressionFormat.pack_quantized.value if how.num_bits in (4, 8):
            if how.actorder == "group":
                raise ValueError(f"{prefix}: groups in the order of activations are not supported")
            return PackedInts(how.num_bits, how.group_size, symmetric=how.symmetric)
        case CompressionFormat.int_quantized.value if how.num_bits == 8 and how.symmetric:
            if how.strategy == QuantizationStrategy.CHANNEL:
                return Int8()
        case CompressionFormat.float_quantized.value if how.num_bits == 8:
            kinds: dict[str, Scales] = {
                QuantizationStrategy.BLOCK: "block",
                QuantizationStrategy.CHANNEL: "channel",
                QuantizationStrategy.TENSOR: "tensor",
            }
            scales = kinds.get(how.strategy)
            if scales == "block" and how.block_structure != [weights.BLOCK, weights.BLOCK]:
                raise ValueError(f"{prefix}: blocks are {how.block_structure}, must be [128, 128]")
            if scales is not None and how.symmetric:
                return Fp8(scales, "weight_scale", static_inputs=static)
        case CompressionFormat.nvfp4_pack_quantized.value:
            return Nvfp4(
                "weight_packed",
                "weight_global_scale",
                divides=True,
                input_scale="input_global_scale" if inputs is not None else None,
            )
        case CompressionFormat.mxfp4_pack_quantized.value:
            return Mxfp4()
    raise ValueError(
        f"{prefix}: experts in the format {scheme.get('format')!r} with {how.num_bits} bits"
        f" ({how.type}, {how.strategy}, symmetric={how.symmetric}) are not supported"
    )


def _scheme(quant_config: Any, layer: Any, prefix: str) -> dict[str, Any] | None:
    """What the checkpoint says of the experts' projections, the same of all three."""
    quant_config._add_fused_moe_to_target_scheme_map()
    names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
    schemes = [quant_config.get_scheme_dict(layer, f"{prefix}.0.{name}") for name in names if name]
    if any(scheme != schemes[0] for scheme in schemes):
        raise ValueError(f"{prefix}: projections of one layer are quantised in different ways")
    return schemes[0]


class PackedInts:
    """weight_packed: value + 8 (or + 128), eight (or four) along K in an int32; weight_scale
    [E, rows, groups]; weight_zero_point int32 [E, rows / 8, groups].

    On a little-endian machine the packed 4-bit weights are the engine's own.
    """

    def __init__(self, bits: int, group_size: int | None, *, symmetric: bool) -> None:
        if bits == 8 and (group_size not in (None, -1) or not symmetric):
            raise ValueError("8-bit experts must be symmetric, with one scale a row")
        self.bits = bits
        self.group_size = None if group_size == -1 else group_size
        self.symmetric = symmetric

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        unit = self.group_size or 8
        kind = "GROUP" if self.group_size else "CHANNEL"
        how = FusedMoeWeightScaleSupported[kind].value
        for name, _, rows, columns in shape.matrices:
            if rows % 8 != 0 or columns % unit != 0:
                raise ValueError(
                    f"{name} has {rows} x {columns} weights in this process, wanted multiples of 8"
                    f" and {unit}"
                )
            groups = columns // self.group_size if self.group_size else 1
            scale = torch.full((shape.experts, rows, groups), torch.nan, dtype=torch.float32)
            add_parameter(layer, f"{name}_weight_scale", scale, attributes, quant_method=how)
            original = torch.empty(shape.experts, 2)
            add_parameter(layer, f"{name}_weight_shape", original, attributes)
            if not self.symmetric:
                zero = torch.zeros((shape.experts, rows // 8, groups), dtype=torch.int32)
                add_parameter(
                    layer, f"{name}_weight_zero_point", zero, attributes, quant_method=how
                )
        add_weights(
            layer,
            shape,
            "weight_packed",
            torch.uint8 if self.bits == 4 else torch.int8,
            attributes,
            packed=8 // self.bits,
            loaded_as=torch.int32,
        )

    def finalize(self, layer: Any) -> ExpertLayer:
        w13, w2 = layer.w13_weight_packed.data, layer.w2_weight_packed.data
        w13_scale, w2_scale = check_scales(layer, "weight_scale")
        if self.bits == 8:
            # The sign bit flipped, value + 128 is the value.
            for codes in (w13, w2):
                codes.bitwise_xor_(torch.tensor(0x80808080 - (1 << 32), dtype=torch.int32))
            return engine_layer(
                layer,
                "int8",
                w13.view(torch.int8),
                w2.view(torch.int8),
                w13_scale=w13_scale.squeeze(-1),
                w2_scale=w2_scale.squeeze(-1),
            )
        more = {}
        if not self.symmetric:
            for name, scale in (("w13", w13_scale), ("w2", w2_scale)):
                packed = getattr(layer, f"{name}_weight_zero_point").data
                zeros = [compressed_zero(of_expert, scale.shape[1]) for of_expert in packed]
                more[f"{name}_zero"] = torch.stack(zeros)
        return engine_layer(
            layer,
            "int4",
            w13.view(torch.uint8),
            w2.view(torch.uint8),
            w13_scale=narrow(w13_scale),
            w2_scale=narrow(w2_scale),
            group_size=self.group_size,
            **more,
        )


class Int8:
    """weight int8 and weight_scale [E, rows, 1]."""

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        add_weights(layer, shape, "weight", torch.int8, attributes)
        for name, _, rows, _ in shape.matrices:
            scale = torch.full((shape.experts, rows, 1), torch.nan, dtype=torch.float32)
            how = FusedMoeWeightScaleSupported.CHANNEL.value
            add_parameter(layer, f"{name}_weight_scale", scale, attributes, quant_method=how)

    def finalize(self, layer: Any) -> ExpertLayer:
        w13_scale, w2_scale = check_scales(layer, "weight_scale")
        return engine_layer(
            layer,
            "int8",
            layer.w13_weight.data,
            layer.w2_weight.data,
            w13_scale=w13_scale.squeeze(-1),
            w2_scale=w2_scale.squeeze(-1),
        )
