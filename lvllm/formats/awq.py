"""Experts of AutoAWQ checkpoints: 4-bit codes packed along the outputs, in an interleaved order."""

from typing import Any

from lvllm.formats import integers, packing
from lvllm.formats.base import ExpertFormat
from lvllm.formats.descriptor import Descriptor, Section, Stored
from lvllm.formats.transposed import TransposedInts
from lvllm.formats.unquantized import Unquantized

__all__ = ["DESCRIPTOR", "awq", "find"]


def _stored(section: Section, module: str) -> Stored:
    bits = section.get("bits") or section.get("w_bit") or 8
    group_size = section.get("group_size") or section.get("q_group_size")
    return integers.stored(bits, group_size, symmetric=not section.get("zero_point"))


DESCRIPTOR = Descriptor(
    "AutoAWQ",
    stored=_stored,
    quantizations=("awq", "auto_awq"),
    quant_methods=("awq",),
    exceptions=("modules_to_not_convert",),
    scales=("scales",),
)


def find(quant_config: Any, layer: Any, prefix: str) -> ExpertFormat | None:
    """Experts of an AutoAWQ checkpoint; those that it leaves alone are not quantised."""
    if not DESCRIPTOR.describes(quant_config):
        return None
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    module = f"{prefix}.0.{layer.ckpt_down_proj_name}"
    if is_layer_skipped(module, quant_config.modules_to_not_convert, match_mode="substring"):
        return Unquantized()
    return awq(quant_config.group_size, symmetric=not quant_config.zero_point)


def awq(group_size: int, *, symmetric: bool) -> ExpertFormat:
    """Experts in AutoAWQ's packing; symmetric ones have no zero points."""
    return TransposedInts(
        4,
        group_size,
        packed_along_rows=True,
        repack=packing.awq_int4,
        repack_zeros=None if symmetric else packing.awq_zero,
    )
