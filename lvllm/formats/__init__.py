"""Checkpoint formats: one module each, with the same functions.

matches(quant_config, prefix) -> bool
    whether the experts of the layer called `prefix` are in this format
create_weights(layer, num_experts, hidden_size, intermediate_size, dtype, attributes)
    register the layer's parameters in engine memory, for vLLM's loader to fill
finalize(layer) -> ExpertLayer
    after loading: the engine's view of those parameters, without a second copy
"""

from types import ModuleType
from typing import Any

from lvllm.formats import unquantized

__all__ = ["FORMATS", "find"]

FORMATS: tuple[ModuleType, ...] = (unquantized,)


def find(quant_config: Any, prefix: str) -> ModuleType:
    """The format of the experts of layer `prefix`; ValueError if none takes them."""
    for module in FORMATS:
        if module.matches(quant_config, prefix):
            return module
    raise ValueError(
        f"{prefix}: experts quantised as {quant_config.get_name()!r} are not supported; supported"
        f" are {', '.join(module.__name__.rpartition('.')[2] for module in FORMATS)}"
    )
