"""Ways to choose the experts on the GPU. Each sees the steps of a trace in order.

A scheme returns the share of all reads that the GPU's experts had. The first half of a trace is not
counted, since all schemes but one begin without knowing anything.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from lvllm.gpu.cache.placement import Placement

__all__ = ["SCHEMES"]

EVERY = 32
"""The steps between two looks at the counts."""
MOVES = 32
"""The most experts that are moved then. 32 experts of Qwen3-30B in 4 bits have 80 MB."""
Trace = Sequence[torch.Tensor]


def _share(trace: Trace, inside: torch.Tensor) -> float:
    """Return the share of reads that go to the experts of bool [layers, experts]."""
    reads = torch.stack(list(trace)).sum(0)
    return float(reads[inside].sum() / reads.sum())


def whole_layers(trace: Trace, slots: int) -> float:
    """The first layers, with all of their experts, as LVLLM_GPU_RESIDENT_MOE_LAYERS has them."""
    inside = torch.zeros_like(trace[0])
    inside[: slots // inside.shape[1]] = True
    return _share(trace[len(trace) // 2 :], inside)


def measured_before(trace: Trace, slots: int) -> float:
    """Those that were read most in the first half, for good, as ktransformers does it."""
    half = len(trace) // 2
    reads = torch.stack(list(trace[:half])).sum(0).flatten()
    inside = torch.zeros(reads.shape, dtype=torch.bool)
    inside[reads.argsort(descending=True)[:slots]] = True
    return _share(trace[half:], inside.view(trace[0].shape))


def least_recently_used(trace: Trace, slots: int) -> float:
    """Each expert that is read enters at once, for the one that was not read for longest."""
    kept: OrderedDict[int, None] = OrderedDict()
    hits = reads = 0
    for step, read in enumerate(trace):
        for expert in read.flatten().nonzero().flatten().tolist():
            hit = expert in kept
            if step >= len(trace) // 2:
                hits, reads = hits + hit, reads + 1
            kept[expert] = None
            kept.move_to_end(expert)
            if len(kept) > slots:
                kept.popitem(last=False)
    return hits / reads


def counted(trace: Trace, slots: int) -> float:
    """LvLLM's: by counts that are halved in time, a few moves between two steps."""
    layers, experts = trace[0].shape
    placement = Placement(layers, experts, slots)
    hits = reads = 0
    since = torch.zeros(trace[0].shape)
    for step, read in enumerate(trace):
        if step >= len(trace) // 2:
            reads += int(read.sum())
            hits += int((read & (placement.table >= 0)).sum())
        since += read
        if (step + 1) % EVERY == 0:
            placement.count(since, EVERY)
            since.zero_()
            placement.moves(MOVES)
    return hits / reads


def known_ahead(trace: Trace, slots: int) -> float:
    """Those that will be read most: the best that no moves can reach."""
    half = trace[len(trace) // 2 :]
    reads = torch.stack(list(half)).sum(0).flatten()
    inside = torch.zeros(reads.shape, dtype=torch.bool)
    inside[reads.argsort(descending=True)[:slots]] = True
    return _share(half, inside.view(trace[0].shape))


SCHEMES: dict[str, Callable[[Trace, int], float]] = {
    "whole layers": whole_layers,
    "measured before": measured_before,
    "last read": least_recently_used,
    "counted": counted,
    "known ahead": known_ahead,
}
