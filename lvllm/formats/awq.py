"""Experts of AutoAWQ checkpoints: 4-bit codes packed along the outputs, in an interleaved order."""

from typing import Any

from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

from lvllm.formats import packing
from lvllm.formats.base import ExpertFormat
from lvllm.formats.transposed import TransposedInts
from lvllm.formats.unquantized import Unquantized

__all__ = ["awq", "find"]


def find(quant_config: Any, layer: Any, prefix: str) -> ExpertFormat | None:
    """Experts of an AutoAWQ checkpoint; those that it leaves alone are plain."""
    if not isinstance(quant_config, AutoAWQConfig):
        return None
    module = f"{prefix}.0.{layer.ckpt_down_proj_name}"
    if is_layer_skipped(module, quant_config.modules_to_not_convert, match_mode="substring"):
        return Unquantized()
    return awq(quant_config.group_size, symmetric=not quant_config.zero_point)


def awq(group_size: int, *, symmetric: bool) -> ExpertFormat:
    """Experts in AutoAWQ's packing; symmetric ones have no zero points."""
    return TransposedInts(
        4,
        group_size,
        along_rows=True,
        turn=packing.awq_int4,
        turn_zeros=None if symmetric else packing.awq_zero,
    )
