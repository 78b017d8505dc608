"""Computes small batches while a model is loaded, so that no kernel is compiled later.

Triton compiles a kernel at its first launch, which takes about a second, and once more for a number
of elements that 16 divides. While a graph is captured, CUDA refuses to load what was compiled, and
while requests are served, they wait for it.
"""

from collections.abc import Iterable, Iterator

import torch

from lvllm.gpu import streamed
from lvllm.gpu.ids import without
from lvllm.gpu.kernels import BLOCK_ROWS
from lvllm.gpu.offloaded_layer import OffloadedLayer
from lvllm.gpu.packing import signature
from lvllm.gpu.ring import StagingRing
from lvllm.units import ceil_div

__all__ = ["cached", "hybrid", "streams"]

SIZES = range(1, 17)
"""The numbers of tokens of small batches: 16 divides the elements of some of them, or of all."""

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def hybrid(layers: Iterable[OffloadedLayer], dtype: torch.dtype) -> None:
    """Call lk as all small batches do. Nobody computes anything for them."""
    for layer in _one_of_each(layers):
        for tokens in SIZES:
            layer.call(*_batch(layer, tokens, dtype))


def streams(
    layers: Iterable[OffloadedLayer], ring: StagingRing, tokens: int, dtype: torch.dtype
) -> None:
    """Stream a batch for each size of blocks, of up to `tokens` tokens that take the same experts.

    The ring holds nothing afterwards. Its copies are done.
    """
    for layer in _one_of_each(layers):
        experts = layer.experts.num_experts
        for rows in BLOCK_ROWS:
            x, ids, weights = _batch(layer, min(rows, tokens), dtype)
            ids[:] = torch.arange(layer.topk, dtype=ids.dtype, device=ids.device)
            ids.masked_fill_(ids >= experts, -1)
            batch = x, ids, weights
            streamed.run(layer.experts, ring, layer.number, *batch, ahead=False)
        # A batch that lk computes in part is divided with a table of experts.
        table = torch.zeros(experts, dtype=torch.int32, device=ids.device)
        for size in SIZES:
            without(ids[:1].expand(size, -1), table)
    ring.abort()
    ring.settle()


def cached(layers: Iterable[OffloadedLayer], tokens: int, dtype: torch.dtype) -> None:
    """Look all small batches up in the cache, and one for each size of blocks, up to `tokens`."""
    for layer in _one_of_each(layers):
        if (cache := layer.cache) is None:
            continue
        # A block has at least as many rows as an expert has on average.
        experts = layer.experts.num_experts
        many = [ceil_div(rows * experts + 1, layer.topk) for rows in BLOCK_ROWS[:-1]]
        for size in sorted({*SIZES, *(min(number, tokens) for number in many)}):
            x, ids, weights = _batch(layer, size, dtype)
            cache.split(ids)
            cache.add(x, ids, weights, torch.empty_like(x), count=False)


def _one_of_each(layers: Iterable[OffloadedLayer]) -> Iterator[OffloadedLayer]:
    """Yield one of the layers that have the same kernels."""
    seen = set()
    for layer in layers:
        experts = layer.experts
        formats = tuple(experts.format_of(name) for name in ("w13", "w3", "w2"))
        kind = experts.num_experts, layer.topk, formats, signature(experts.tensors)
        if kind not in seen:
            seen.add(kind)
            yield layer


def _batch(layer: OffloadedLayer, tokens: int, dtype: torch.dtype) -> Batch:
    """Return x, ids and weights of tokens that take no expert."""
    device, shape = layer.accelerator.device, (tokens, layer.topk)
    return (
        torch.zeros((tokens, layer.experts.hidden_size), dtype=dtype, device=device),
        torch.full(shape, -1, dtype=torch.int32, device=device),
        torch.zeros(shape, dtype=torch.float32, device=device),
    )
