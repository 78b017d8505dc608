"""Experts of compressed-tensors checkpoints: 4- and 8-bit integers, fp8, nvfp4 and mxfp4.

Only the weights are taken as quantised; what a checkpoint says of its activations is ignored.
"""

from typing import Any

import torch
from torch.nn import Module

from lvllm.formats import integers
from lvllm.formats.base import (
    ExpertFormat,
    Shape,
    add_parameter,
    add_weights,
    check_scales,
    place_whole,
)
from lvllm.formats.descriptor import Descriptor, Section, Stored, names_module
from lvllm.formats.fp4 import Mxfp4, Nvfp4
from lvllm.formats.fp8 import BLOCK, Fp8, Scales
from lvllm.formats.packing import compressed_zero, compressed_zero8
from lvllm.formats.unquantized import Unquantized

__all__ = ["DESCRIPTOR", "ORDERED", "Int8", "PackedInts", "find"]

ORDERED = ("group", "dynamic")
"""Kinds of act-order for which a checkpoint has g_idx; with others, groups lie in order."""


def _stored(section: Section, module: str) -> Stored:
    parts = [_stored_in(group["weights"]) for group in _groups(section, module)]
    computable = all(part.computable for part in parts)
    return Stored(max((part.bits for part in parts), default=8), computable)


def _groups(section: Section, module: str) -> list[Section]:
    """The groups of the section that may describe the module: those that name it, or else those
    that name its class. Names are those of one model family: where none fits, it may be any group.
    """
    groups = [
        group for group in (section.get("config_groups") or {}).values() if group.get("weights")
    ]
    by_name = [g for g in groups if any(names_module(t, module) for t in g.get("targets", ()))]
    by_class = [group for group in groups if "Linear" in group.get("targets", ())]
    return by_name or by_class or groups


def _stored_in(weights: Section) -> Stored:
    bits = weights.get("num_bits") or 8
    if weights.get("type") == "float":
        return Stored(bits)
    return integers.stored(
        bits,
        weights.get("group_size"),
        symmetric=bool(weights.get("symmetric", True)),
        act_order=weights.get("actorder") in ORDERED,
    )


DESCRIPTOR = Descriptor(
    "compressed-tensors",
    stored=_stored,
    quantizations=("compressed-tensors",),
    quant_methods=("compressed-tensors", "compressed_tensors"),
    exceptions=("ignore",),
    weights=("weight_packed",),
    input_scales=("input_scale", "input_global_scale", "output_scale"),
    divisors=("weight_global_scale",),
)


def find(quant_config: Any, layer: Any, prefix: str) -> ExpertFormat | None:
    """Experts of a compressed-tensors checkpoint; those that it leaves alone are not quantised."""
    if not DESCRIPTOR.describes(quant_config):
        return None
    scheme = _scheme(quant_config, layer, prefix)
    if scheme is None:
        return Unquantized()
    how = scheme["weights"]
    inputs = scheme.get("input_activations")
    static = inputs is not None and not inputs.dynamic
    match scheme.get("format"):
        case "pack-quantized" if how.num_bits in (4, 8):
            act_order = how.actorder in ORDERED
            return PackedInts(how.num_bits, how.group_size, how.symmetric, act_order=act_order)
        case "int-quantized" if how.num_bits == 8 and how.symmetric:
            if how.strategy == "channel":
                return Int8()
        case "float-quantized" if how.num_bits == 8:
            kinds: dict[str, Scales] = {"block": "block", "channel": "channel", "tensor": "tensor"}
            scales = kinds.get(how.strategy)
            if scales == "block" and how.block_structure != BLOCK:
                raise ValueError(f"{prefix}: blocks are {how.block_structure}, must be [128, 128]")
            if scales is not None and how.symmetric:
                return Fp8(scales, "weight_scale", static_inputs=static)
        case "nvfp4-pack-quantized":
            return Nvfp4(
                "weight_packed",
                "weight_global_scale",
                divides=True,
                input_scale="input_global_scale" if inputs is not None else None,
            )
        case "mxfp4-pack-quantized":
            return Mxfp4("weight_packed")
    raise ValueError(
        f"{prefix}: experts in the format {scheme.get('format')!r} with {how.num_bits} bits"
        f" ({how.type}, {how.strategy}, symmetric={how.symmetric}) are not supported"
    )


def _scheme(quant_config: Any, layer: Any, prefix: str) -> dict[str, Any] | None:
    """What the checkpoint says of the experts' three projections, which must be the same."""
    quant_config._add_fused_moe_to_target_scheme_map()
    names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
    schemes = [quant_config.get_scheme_dict(layer, f"{prefix}.0.{name}") for name in names if name]
    if any(scheme != schemes[0] for scheme in schemes):
        raise ValueError(f"{prefix}: projections of one layer are quantised in different ways")
    return schemes[0]


class PackedInts(ExpertFormat):
    """Experts of the format pack-quantized.

    weight_packed holds value + 8 (or + 128), eight (or four) along K in an int32; weight_scale is
    [E, rows, groups]; weight_zero_point int32 [E, rows * bits / 32, groups]; weight_g_idx int32
    [E, parts, columns]. On a little-endian machine the engine's 4-bit codes are the same bytes.
    """

    def __init__(
        self, bits: int, group_size: int | None, symmetric: bool, *, act_order: bool
    ) -> None:
        self.bits = bits
        self.group_size = None if group_size == -1 else group_size
        self.symmetric = symmetric
        self.act_order = act_order and self.group_size is not None
        self.computable = not self.act_order and integers.computable(
            bits, self.group_size, symmetric=symmetric
        )

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        per_word = 32 // self.bits
        unit = per_word if self.act_order else self.group_size or per_word
        how = "group" if self.group_size else "channel"
        for name, parts, rows, columns in shape.matrices:
            if rows % (per_word * parts) != 0 or columns % unit != 0:
                raise ValueError(
                    f"{name} has {rows} x {columns} weights in this process, wanted multiples of"
                    f" {per_word * parts} and {unit}"
                )
            groups = integers.groups_of(layer, name, columns, self.group_size, self.act_order)
            more = {"quant_method": how} | integers.whole(name, self.group_size, self.act_order)
            scale = torch.full((shape.experts, rows, groups), torch.nan, dtype=torch.float32)
            add_parameter(layer, f"{name}_weight_scale", scale, attributes, **more)
            original = torch.empty((shape.experts, 2), dtype=torch.int64)
            unused = {"optional": True, "place": place_whole}
            add_parameter(layer, f"{name}_weight_shape", original, attributes, **unused)
            if not self.symmetric:
                zero = torch.zeros((shape.experts, rows // per_word, groups), dtype=torch.int32)
                add_parameter(layer, f"{name}_weight_zero_point", zero, attributes, **more)
        if self.act_order:
            integers.add_group_index(layer, shape, "weight_g_idx", attributes)
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
        codes, zeros, group_index = {}, {}, {}
        scales = dict(zip(("w13", "w2"), check_scales(layer, "weight_scale"), strict=True))
        for name, scale in scales.items():
            words = getattr(layer, f"{name}_weight_packed").data
            if self.bits == 8:
                # Flipping the highest bit of value + 128 gives the value.
                words.bitwise_xor_(torch.tensor(0x80808080 - (1 << 32), dtype=torch.int32))
            codes[name] = words.view(torch.uint8 if self.bits == 4 else torch.int8)
            if not self.symmetric:
                packed = getattr(layer, f"{name}_weight_zero_point").data
                unpack = compressed_zero if self.bits == 4 else compressed_zero8
                zeros[name] = torch.stack([unpack(words, scale.shape[1]) for words in packed])
            if self.act_order:
                group_index[name] = getattr(layer, f"{name}_weight_g_idx").data
        return integers.tensors(self.bits, self.group_size, codes, scales, zeros, group_index)


class Int8(ExpertFormat):
    """Experts of the format int-quantized: weight int8 and weight_scale [E, rows, 1]."""

    bits = 8

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        add_weights(layer, shape, "weight", torch.int8, attributes)
        for name, _, rows, _ in shape.matrices:
            scale = torch.full((shape.experts, rows, 1), torch.nan, dtype=torch.float32)
            how = {"quant_method": "channel"}
            add_parameter(layer, f"{name}_weight_scale", scale, attributes, **how)

    def tensors(self, layer: Any) -> dict[str, Any]:
        w13_scale, w2_scale = check_scales(layer, "weight_scale")
        return {
            "format": "int8",
            "w13": layer.w13_weight.data,
            "w2": layer.w2_weight.data,
            "w13_scale": w13_scale.squeeze(-1),
            "w2_scale": w2_scale.squeeze(-1),
        }
