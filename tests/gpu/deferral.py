"""What the layers of a pass return if they defer experts, by calling each of them directly."""

from collections.abc import Sequence

import torch

from lvllm.engine.expert_layer import ExpertLayer

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def deferring(
    layers: Sequence[ExpertLayer], batches: Sequence[Batch], count: int
) -> list[torch.Tensor]:
    """Return the result of each layer for its batch x, ids and weights; bit for bit what is wanted.

    The `count` least weighted experts of each token, but never all, are added one layer later. The
    last layer defers none. No two weights of a token may be equal.
    """
    results: list[torch.Tensor] = []
    deferred = None
    for layer, (x, ids, weights) in zip(layers, batches, strict=True):
        most = (ids >= 0).sum(1, keepdim=True) - 1
        if layer is layers[-1]:
            most = most.zero_()
        place = weights.where(ids >= 0, torch.inf).argsort(1).argsort(1)
        later = place < most.clamp(max=count)
        out = layer(x, ids.masked_fill(later, -1), weights)
        if deferred is not None:
            out = (out.float() + deferred.float()).to(x.dtype)
        results.append(out)
        deferred = layer(x, ids.masked_fill(~later, -1), weights)
    return results
