"""Experts of compressed-tensors checkpoints: 4- and 8-bit integers, fp8, nvfp4 and mxfp4.

Weights alone are taken as quantised: what a checkpoint says of its activations is left.
"""

from typing import Any

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    ActivationOrdering,
    QuantizationArgs,
    QuantizationStrategy,
)
from torch.nn import Module
from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)

from lvllm.engine import weight_formats
from lvllm.formats import integers
from lvllm.formats.base import ExpertFormat, Shape, add_parameter, add_weights, check_scales
from lvllm.formats.fp4 import Mxfp4, Nvfp4
from lvllm.formats.fp8 import Fp8, Scales
from lvllm.formats.packing import compressed_zero, compressed_zero8
from lvllm.formats.unquantized import Unquantized

__all__ = ["Int8", "PackedInts", "find"]

ORDERED = (ActivationOrdering.GROUP.value, ActivationOrdering.DYNAMIC.value)
"""Kinds of act-order that a checkpoint has to tell; the others leave groups one after another."""


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
            ordered = how.actorder in ORDERED
            return PackedInts(how.num_bits, how.group_size, how.symmetric, ordered=ordered)
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
            if scales == "block" and how.block_structure != [
                weight_formats.BLOCK,
                weight_formats.BLOCK,
            ]:
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
            return Mxfp4("weight_packed")
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


class PackedInts(ExpertFormat):
    """weight_packed: value + 8 (or + 128), eight (or four) along K in an int32; weight_scale
    [E, rows, groups]; weight_zero_point int32 [E, rows * bits / 32, groups]; weight_g_idx int32
    [E, parts, columns].

    On a little-endian machine the packed 4-bit weights are the engine's own.
    """

    def __init__(
        self, bits: int, group_size: int | None, symmetric: bool, *, ordered: bool
    ) -> None:
        self.bits = bits
        self.group_size = None if group_size == -1 else group_size
        self.symmetric = symmetric
        self.ordered = ordered and self.group_size is not None
        self.computable = not self.ordered and integers.computable(
            bits, self.group_size, symmetric=symmetric
        )

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        per_word = 32 // self.bits
        unit = per_word if self.ordered else self.group_size or per_word
        kind = "GROUP" if self.group_size else "CHANNEL"
        how = FusedMoeWeightScaleSupported[kind].value
        for name, parts, rows, columns in shape.matrices:
            if rows % (per_word * parts) != 0 or columns % unit != 0:
                raise ValueError(
                    f"{name} has {rows} x {columns} weights in this process, wanted multiples of"
                    f" {per_word * parts} and {unit}"
                )
            groups = integers.groups_of(layer, name, columns, self.group_size, self.ordered)
            more = {"quant_method": how} | integers.whole(name, self.ordered)
            scale = torch.full((shape.experts, rows, groups), torch.nan, dtype=torch.float32)
            add_parameter(layer, f"{name}_weight_scale", scale, attributes, **more)
            original = torch.empty((shape.experts, 2), dtype=torch.int64)
            add_parameter(layer, f"{name}_weight_shape", original, attributes, optional=True)
            if not self.symmetric:
                zero = torch.zeros((shape.experts, rows // per_word, groups), dtype=torch.int32)
                add_parameter(layer, f"{name}_weight_zero_point", zero, attributes, **more)
        if self.ordered:
            integers.add_order(layer, shape, "weight_g_idx", attributes)
        add_weights(
            layer,
            shape,
            "weight_packed",
            torch.uint8 if self.bits == 4 else torch.int8,
            attributes,
            packed=8 // self.bits,
            loaded_as=torch.int32,
        )

    def tensors(self, layer: Any) -> dict[str, Any]:
        codes, zeros, order = {}, {}, {}
        scales = dict(zip(("w13", "w2"), check_scales(layer, "weight_scale"), strict=True))
        for name, scale in scales.items():
            words = getattr(layer, f"{name}_weight_packed").data
            if self.bits == 8:
                # The sign bit flipped, value + 128 is the value.
                words.bitwise_xor_(torch.tensor(0x80808080 - (1 << 32), dtype=torch.int32))
            codes[name] = words.view(torch.uint8 if self.bits == 4 else torch.int8)
            if not self.symmetric:
                packed = getattr(layer, f"{name}_weight_zero_point").data
                unpack = compressed_zero if self.bits == 4 else compressed_zero8
                zeros[name] = torch.stack([unpack(words, scale.shape[1]) for words in packed])
            if self.ordered:
                order[name] = getattr(layer, f"{name}_weight_g_idx").data
        return integers.tensors(self.bits, self.group_size, codes, scales, zeros, order)


class Int8(ExpertFormat):
    """weight int8 and weight_scale [E, rows, 1]."""

    bits = 8

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        add_weights(layer, shape, "weight", torch.int8, attributes)
        for name, _, rows, _ in shape.matrices:
            scale = torch.full((shape.experts, rows, 1), torch.nan, dtype=torch.float32)
            how = FusedMoeWeightScaleSupported.CHANNEL.value
            add_parameter(layer, f"{name}_weight_scale", scale, attributes, quant_method=how)

    def tensors(self, layer: Any) -> dict[str, Any]:
        w13_scale, w2_scale = check_scales(layer, "weight_scale")
        return {
            "format": "int8",
            "w13": layer.w13_weight.data,
            "w2": layer.w2_weight.data,
            "w13_scale": w13_scale.squeeze(-1),
            "w2_scale": w2_scale.squeeze(-1),
        }
