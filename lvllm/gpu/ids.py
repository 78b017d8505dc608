"""The experts' ids of a batch, on a device."""

import torch

__all__ = ["without"]


def without(topk_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return topk_ids [M, k] as int32, with -1 in the place of experts that are in a table.

    `table` is int32 [E], on the same device, with a number of at least 0 for each expert that is in
    it, and else -1. An id that is no expert stays as it is.
    """
    if topk_ids.is_cuda:
        from lvllm.gpu.kernels import split

        return split.run(topk_ids, table)
    known = (topk_ids >= 0) & (topk_ids < len(table))
    inside = known & (table[topk_ids.where(known, 0).long()] >= 0)
    return topk_ids.int().masked_fill(inside, -1)
