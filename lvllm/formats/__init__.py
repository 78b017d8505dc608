"""Checkpoint formats: one module each, with one function, and a registry over them.

find(quant_config, layer, prefix) -> ExpertFormat | None
    how the experts of the layer called `prefix` are stored, or None if in no format of the module
"""

from types import ModuleType
from typing import Any

from lvllm.formats import (
    auto_round,
    awq,
    compressed_tensors,
    fp8,
    gpt_oss,
    gptq,
    modelopt,
    unquantized,
)
from lvllm.formats.base import ExpertFormat

__all__ = ["FORMATS", "ExpertFormat", "find"]

FORMATS: tuple[ModuleType, ...] = (
    gpt_oss,  # first: a model, in whatever format
    unquantized,
    fp8,
    compressed_tensors,
    modelopt,
    awq,
    gptq,
    auto_round,
)


def find(quant_config: Any, layer: Any, prefix: str) -> ExpertFormat:
    """The format of the experts of `layer`, called `prefix`; ValueError if none takes them."""
    for module in FORMATS:
        found: ExpertFormat | None = module.find(quant_config, layer, prefix)
        if found is not None:
            return found
    raise ValueError(
        f"{prefix}: experts quantised as {quant_config.get_name()!r} are not supported; supported"
        f" are {', '.join(module.__name__.rpartition('.')[2] for module in FORMATS)}"
    )
