"""Experts of AutoRound checkpoints, in GPTQ's or AutoAWQ's packing."""

from typing import Any

from vllm.model_executor.layers.quantization.inc import INCConfig

from lvllm.formats.awq import awq
from lvllm.formats.base import ExpertFormat
from lvllm.formats.gptq import gptq
from lvllm.formats.unquantized import Unquantized

__all__ = ["find"]


def find(quant_config: Any, layer: Any, prefix: str) -> ExpertFormat | None:
    """Experts of an AutoRound checkpoint; those that it leaves alone are plain."""
    if not isinstance(quant_config, INCConfig):
        return None
    projections = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
    names = [f"{prefix}.0.{name}" for name in projections if name]
    found = {quant_config.config_parser.resolve(layer, name) for name in names}
    if len(found) > 1:
        raise ValueError(f"{prefix}: projections of one layer are quantised in different ways")
    (how,) = found
    if not how.quantized:
        return Unquantized()
    if how.is_wna16_int and how.is_gptq and how.bits in (4, 8):
        return gptq(how.bits, how.group_size, symmetric=how.sym, ordered=False, v2=False)
    if how.is_wna16_int and how.is_awq and how.bits == 4:
        return awq(how.group_size, symmetric=how.sym)
    raise ValueError(
        f"{prefix}: AutoRound's {how.data_type} of {how.bits} bits in the packing"
        f" {how.packing_format!r} is not supported; supported are int of 4 and 8 bits in"
        " auto_round:auto_gptq and of 4 bits in auto_round:auto_awq"
    )
