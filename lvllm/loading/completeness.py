"""Weights beside the experts that a checkpoint does not have.

vLLM looks for them in unquantised models alone, and passes over its linear layers and embeddings,
which begin as whatever the memory held: such a model starts and answers with noise. So here one
weight of each of their rows begins as NaN.
"""

import re
from collections.abc import Callable

import torch
from torch.nn import Module
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

__all__ = ["require_all"]

PLAIN = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


def require_all(load: Callable[[], None], model: Module) -> None:
    """Have `load` fill `model`; ValueError, in one line with the weight's name, if it does not.

    Rows that a checkpoint really has as NaN are refused, too.
    """
    for _, mark in _marks(model):
        mark.fill_(torch.nan)
    try:
        load()
    except ValueError as error:  # vLLM's own check, of all other weights
        if "not initialized from checkpoint" not in str(error):
            raise
        first, *others = sorted(re.findall(r"'([^']+)'", str(error)))
        more = f", nor are {len(others)} others" if others else ""
        raise ValueError(f"{first} is not in the checkpoint{more}") from None
    for name, mark in _marks(model):  # again: loading may have replaced a parameter's memory
        missing = mark.isnan().nonzero().flatten().tolist()
        if missing:
            raise ValueError(
                f"{name} is not in the checkpoint, or NaN: {len(missing)} of its {len(mark)} rows,"
                f" the first is {missing[0]}"
            )


def _marks(model: Module) -> list[tuple[str, torch.Tensor]]:
    """The first weight of each row of every plain matrix, by the matrix's name."""
    found = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.numel() == 0 or not weight.is_floating_point():
            continue
        if isinstance(getattr(module, "quant_method", None), PLAIN):
            found.append((f"{name}.weight", weight.data.flatten(1)[:, 0]))
    return found
