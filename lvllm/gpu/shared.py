"""Computes the experts of a batch on the CPU and on a device at the same time."""

from collections.abc import Callable

import torch

from lvllm.engine.counters import Reason
from lvllm.engine.expert_layer import ExpertLayer
from lvllm.gpu import streamed
from lvllm.gpu.hybrid import HybridCall
from lvllm.gpu.ids import without
from lvllm.gpu.pairs import Pairs
from lvllm.gpu.ring import StagingRing
from lvllm.gpu.shares import Rates, divide

__all__ = ["run"]


def run(
    layer: ExpertLayer,
    ring: StagingRing,
    number: int,
    call: HybridCall,
    rates: Rates,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    count: Callable[[int, list[int]], object] | None = None,
) -> torch.Tensor:
    """Compute what `streamed.run` computes, of which lk computes some experts through `call`.

    The host waits for the device twice, to learn how many tokens each expert has.

    `rates` decide which experts are whose: all of them may be the device's, or all lk's. The next
    layers are copied ahead in the first case alone. Otherwise the bus would be busy with experts
    that lk will compute.

    Returns [M, H] in x's dtype: the sum of both parts, each of which is rounded to this dtype.
    """
    counts = Pairs.sort(topk_ids, topk_weights, layer.num_experts).counts()
    of_device, _ = divide(counts, rates)
    if not any(of_device):
        return call.start(x, topk_ids, topk_weights, Reason.SMALL, beside=True).end()
    everyone = all(mine for mine, tokens in zip(of_device, counts, strict=True) if tokens)
    if everyone:
        return streamed.run(layer, ring, number, x, topk_ids, topk_weights, count=count)
    table = torch.tensor([0 if mine else -1 for mine in of_device], dtype=torch.int32).to(x.device)
    of_lk = without(topk_ids, table)
    ids = topk_ids.where(of_lk < 0, -1)
    started = call.start(x, of_lk, topk_weights, Reason.SHARED, beside=True)
    try:
        part = streamed.run(layer, ring, number, x, ids, topk_weights, ahead=False, count=count)
    finally:
        out = started.end()
    return out.add_(part)
