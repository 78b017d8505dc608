"""Experts of AutoRound checkpoints, in GPTQ's or AutoAWQ's packing."""

from typing import Any

from lvllm.formats import integers
from lvllm.formats.awq import awq
from lvllm.formats.base import ExpertFormat
from lvllm.formats.descriptor import PLAIN, Descriptor, Section, Stored
from lvllm.formats.gptq import gptq
from lvllm.formats.unquantized import Unquantized

__all__ = ["DESCRIPTOR", "find"]


def _stored(section: Section, module: str) -> Stored:
    bits = section.get("bits") or 8
    if bits >= 16:
        return PLAIN
    symmetric = bool(section.get("sym", True))
    return integers.stored(bits, section.get("group_size"), symmetric=symmetric)


DESCRIPTOR = Descriptor(
    "AutoRound",
    stored=_stored,
    quantizations=("inc",),
    quant_methods=("auto-round",),
    exceptions=("extra_config",),
    scales=("scales",),
)


def find(quant_config: Any, layer: Any, prefix: str) -> ExpertFormat | None:
    """Experts of an AutoRound checkpoint; those that it leaves alone are not quantised."""
    if not DESCRIPTOR.describes(quant_config):
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
        return gptq(how.bits, how.group_size, symmetric=how.sym, act_order=False, v2=False)
    if how.is_wna16_int and how.is_awq and how.bits == 4:
        return awq(how.group_size, symmetric=how.sym)
    raise ValueError(
        f"{prefix}: AutoRound's {how.data_type} of {how.bits} bits in the packing"
        f" {how.packing_format!r} is not supported; supported are int of 4 and 8 bits in"
        " auto_round:auto_gptq and of 4 bits in auto_round:auto_awq"
    )
