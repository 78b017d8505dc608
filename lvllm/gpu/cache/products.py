"""The products of a batch with the experts that have slots, on a device."""

from collections.abc import Mapping

import torch

from lvllm.engine.expert_layer import ExpertLayer
from lvllm.gpu import products
from lvllm.gpu.pairs import Pairs

__all__ = ["SCRATCH_BYTES", "multiply"]

SCRATCH_BYTES = 128 << 20
"""The limit of the results of a batch's pairs at a time. Those of 512 tokens with 8 experts each
and a hidden size of 7168 take as much. Graphs of all sizes share it."""


def multiply(
    layer: ExpertLayer,
    slots: Mapping[str, torch.Tensor],
    table: torch.Tensor,
    x: torch.Tensor,
    pairs: Pairs,
    total: torch.Tensor,
) -> None:
    """Compute the experts that have slots for the tokens that take them.

    On a GPU the host waits for nothing, and a graph can hold it.

    Args:
        layer: gives sizes, format and activation; its own memory is not read.
        slots: the experts in the slots, by the names of `layer.tensors`.
        table: int32 [E], the slot of each expert, or -1. It is read in stream order.
        x: [M, H] bfloat16 or float16.
        pairs: all pairs of the batch, also those of experts without slots.
        total: float32 [M, H], to which the weighted results are added.
    """
    if x.is_cuda and products.has_whole_words(layer):
        from lvllm.gpu.kernels import experts

        experts.multiply_cached(layer, slots, table, x, pairs, total, scratch_bytes=SCRATCH_BYTES)
        return
    for expert, slot in enumerate(table.tolist()):
        if slot >= 0:
            some = {name: of[slot : slot + 1] for name, of in slots.items()}
            products.multiply(layer, some, range(expert, expert + 1), x, pairs, total)
