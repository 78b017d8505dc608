"""Experts of symmetric GPTQ checkpoints, and of AutoRound's in that packing: codes packed along the
inputs.
"""

from typing import Any

from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override

from lvllm.formats import packing
from lvllm.formats.base import ExpertFormat
from lvllm.formats.transposed import TransposedInts
from lvllm.formats.unquantized import Unquantized

__all__ = ["find"]


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
    # g_idx goes up by one every group, and zero points are all in the middle.
    return TransposedInts(
        bits,
        group_size,
        along_rows=False,
        turn=packing.gptq_int4 if bits == 4 else packing.gptq_int8,
        left=("g_idx",),
    )
