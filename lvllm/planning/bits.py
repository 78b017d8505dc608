"""How many bits a weight takes, in the experts and in all else."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lvllm import formats
from lvllm.errors import quoted
from lvllm.formats import gpt_oss
from lvllm.planning.errors import PlanError

__all__ = ["PLAIN", "Bits", "FormatShare", "of_section"]

GROUPS = {"mxfp4": 32, "nvfp4": 16}
"""Formats that fix how many weights of a row share a scale."""
GROUP_SCALES = {name: 8 / size for name, size in GROUPS.items()}
"""Bits of scales for each weight in these."""
EXPERT = "model.layers.99.mlp.experts.0.up_proj"
OTHER = "model.layers.99.self_attn.o_proj"
"""Modules whose entries in a section stand for all of their kind."""


@dataclass(frozen=True)
class FormatShare:
    """The part of the experts' weights that is in one format."""

    format: str
    """As the engine calls it."""
    share: float
    """Of all experts' weights."""
    bits: float
    """Of a weight in memory, with its share of the scales."""


@dataclass(frozen=True)
class Bits:
    """Bits of a weight, with its share of the scales."""

    format: str
    """The experts' number format, as the engine calls it."""
    experts: float
    others: float
    parts: tuple[FormatShare, ...] = ()
    """The formats of experts that GGUF files store, if the engine computes them; else none."""
    block: int = 1
    """A rank's part of the rows of gate and up, which are the columns of down, has a multiple of so
    many: it cannot have a part of a block."""


PLAIN = Bits("bf16", 16, 16)


def of_section(section: Mapping[str, Any] | None) -> Bits:
    """What `quantization_config` of a config.json says. Raises PlanError for an unknown format."""
    if not section:
        return PLAIN
    descriptor = formats.describe(section)
    if descriptor is None:
        raise PlanError(
            f"quant_method {quoted(section.get('quant_method'))} is none of those that LvLLM reads:"
            f" {', '.join(formats.QUANTIZATIONS)}"
        )
    experts = descriptor.of_module(section, EXPERT).bits
    others: float = descriptor.of_module(section, OTHER).bits
    if descriptor is gpt_oss.DESCRIPTOR:
        others = PLAIN.others  # Only its experts are quantised.
    format = _format(section, experts)
    scale = GROUP_SCALES.get(format) or _group_scale(section)
    block = (section.get("weight_block_size") or [GROUPS.get(format, 1)])[0]
    sizes = (experts + scale * (experts < 16), others + scale * (others < 16))
    return Bits(format, *sizes, block=block if isinstance(block, int) else 1)


def _format(section: Mapping[str, Any], bits: int) -> str:
    """The engine's name of the format: the sections have no field of the same name."""
    text = json.dumps(section).lower()
    if bits == 4:
        return next((name for name in GROUP_SCALES if name in text), "int4")
    if bits == 8:
        return "fp8" if "fp8" in text or '"float"' in text else "int8"
    return "bf16"


def _group_scale(section: Mapping[str, Any]) -> float:
    """Bits of scales, of 16 bits for each group, for each weight; 0 where groups are large."""
    groups = [section, *dict(section.get("config_groups") or {}).values()]
    for group in groups:
        size = group.get("group_size") or (group.get("weights") or {}).get("group_size")
        if size and size > 0:
            return 16 / float(size)
    return 0
