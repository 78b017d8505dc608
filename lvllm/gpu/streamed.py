"""Computes the experts of a layer on a device, from weights that are copied there as lk has them.

Arithmetic in 16 bits costs little here. By count (a bus of 55 GB/s, 600 TFLOP/s), the copy of a
layer of Qwen3-30B takes six (int4) to twenty times (bf16) as long as the products of 8192 tokens.
"""

from collections.abc import Callable

import torch

from lvllm.engine.expert_layer import ExpertLayer
from lvllm.gpu.pairs import Pairs
from lvllm.gpu.products import SCRATCH_BYTES, multiply
from lvllm.gpu.ring import StagingRing
from lvllm.units import ceil_div

__all__ = ["SUM_BYTES", "run"]

SUM_BYTES = 1 << 30
"""The limit of the float32 sums of a batch. A larger batch is computed in parts, and each part
copies the experts again: with a hidden size of 7168, one of more than 37 thousand tokens. vLLM
measures a step's memory with the largest batch, and so counts them."""


def run(
    layer: ExpertLayer,
    ring: StagingRing,
    number: int,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    scratch_bytes: int = SCRATCH_BYTES,
    sum_bytes: int = SUM_BYTES,
    ahead: bool = True,
    count: Callable[[int, list[int]], object] | None = None,
) -> torch.Tensor:
    """Compute what `layer(x, topk_ids, topk_weights)` computes, on the ring's device.

    The host waits for the device once a part, to learn how many tokens each expert has.

    Args:
        layer: gives sizes, format and activation; its own memory is not read.
        ring: streams the layer's experts.
        number: the layer's number in the ring.
        x: [M, H] bfloat16 or float16.
        topk_ids: [M, k] int32 or int64; -1 skips the slot.
        topk_weights: [M, k] float32.
        scratch_bytes: the limit of converted matrices at a time, and that of rows.
        sum_bytes: the limit of the sums.
        ahead: whether the next layers are copied behind this one.
        count: is told the tokens of each part, and how many of them each expert has.

    Returns:
        [M, H] in x's dtype. Sums over k are in float32, in the order of the experts.

    Raises:
        ValueError: for an id that is neither an expert nor -1.
    """
    out = torch.empty_like(x)
    most = max(1, sum_bytes // (4 * layer.hidden_size))
    parts = max(1, ceil_div(len(x), most))
    for part in range(parts):
        rows = slice(part * len(x) // parts, (part + 1) * len(x) // parts)
        pairs = Pairs.sort(topk_ids[rows], topk_weights[rows], layer.num_experts)
        counts = pairs.counts()
        if count is not None:
            count(rows.stop - rows.start, counts)
        total = torch.zeros_like(x[rows], dtype=torch.float32)
        # A part that is followed by another would have the next layer's copies dropped.
        last = part == parts - 1
        for some, tensors in ring.stream(number, counts, ahead=ahead and last):
            multiply(layer, tensors, some, x[rows], pairs, total, scratch_bytes=scratch_bytes)
        out[rows] = total
    return out
