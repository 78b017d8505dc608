"""The products of some experts of a layer with their tokens, on a device.

The experts are converted to plain matrices of the model's dtype, a few at a time, and multiplied
with the rows of their tokens by PyTorch's grouped product, some tokens at a time. The scratch
memory for both is bounded: all experts of a layer may take ten times as much, and so may the rows
of 32 thousand tokens.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch.nn import functional as F

from lvllm.engine.activations import activate
from lvllm.engine.expert_layer import ExpertLayer
from lvllm.gpu.convert import convert

__all__ = ["SCRATCH_BYTES", "Pairs", "multiply"]

SCRATCH_BYTES = 512 << 20
"""The limit of converted matrices at a time, and that of rows at a time. Writing this much takes
0.1 ms, and starting the few kernels takes 20 us."""


@dataclass(frozen=True)
class Pairs:
    """The pairs of a token and a slot of a batch, sorted by their experts. P is M * k."""

    experts: torch.Tensor
    """int64 [P]: the expert of each pair. Skipped slots, with -1, come first."""
    slots: torch.Tensor
    """int64 [P]: the token times k plus the slot."""
    weights: torch.Tensor
    """float32 [P, 1]: the router's weight."""
    starts_on_device: torch.Tensor
    """int64 [E + 1]: starts[e] is the first pair of expert e; starts[E] ends the last one's."""
    starts: list[int]
    """The same numbers on the host."""
    topk: int

    @classmethod
    def sort(cls, topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: int) -> Self:
        """Sort topk_ids [M, k] and topk_weights [M, k] by experts.

        The host waits for the device once, to learn how many tokens each expert has.

        Raises ValueError for an id that is neither in [0, experts) nor -1.
        """
        of_pairs, slots = topk_ids.flatten().long().sort(stable=True)
        # The search, unlike torch.bincount, does not make the host wait for the device.
        bounds = torch.arange(-1, experts + 1, device=topk_ids.device)
        below, *starts = (on_device := torch.searchsorted(of_pairs, bounds)).tolist()
        if below or starts[-1] < slots.numel():
            wrong = of_pairs[0 if below else -1].item()
            raise ValueError(f"topk_ids has {wrong}, must be -1 or in [0, {experts})")
        weights = topk_weights.flatten()[slots].unsqueeze(1)
        return cls(of_pairs, slots, weights, on_device[1:], starts, topk_ids.shape[1])

    def counts(self) -> list[int]:
        """The number of tokens of each expert."""
        return [end - begin for begin, end in pairwise(self.starts)]


def multiply(
    layer: ExpertLayer,
    tensors: Mapping[str, torch.Tensor],
    some: range,
    x: torch.Tensor,
    pairs: Pairs,
    total: torch.Tensor,
    *,
    scratch_bytes: int = SCRATCH_BYTES,
) -> None:
    """Compute consecutive experts of a layer for the tokens that take them.

    Args:
        layer: gives sizes, format and activation; its own memory is not read.
        tensors: these experts' parts of `layer.tensors`, on the device of the other arguments. The
            first of each belongs to expert `some.start`.
        some: the experts.
        x: [M, H] bfloat16 or float16.
        pairs: all pairs of the batch.
        total: float32 [M, H], to which the weighted results of these experts are added. The sums
            are the same each time.
        scratch_bytes: the limit of converted matrices at a time, and that of rows. One expert is
            always converted, and one row computed.
    """
    starts = pairs.starts
    rows = max(1, scratch_bytes // _row_bytes(layer))
    for few in _chunks(layer, some, x.dtype, scratch_bytes):
        begin, end = starts[few.start], starts[few.stop]
        if end == begin:
            continue
        here = range(few.start - some.start, few.stop - some.start)
        w13 = convert(layer, tensors, "w13", here, x.dtype)
        w2 = convert(layer, tensors, "w2", here, x.dtype)
        for first in range(begin, end, rows):
            last = min(first + rows, end)
            bounds = [min(max(start, first), last) for start in starts[few.start : few.stop + 1]]
            of_each = [stop - start for start, stop in pairwise(bounds)]
            # This uses the numbers on the device: copying them from the host would make it wait.
            ends = pairs.starts_on_device[few.start + 1 : few.stop + 1] - first
            ends = ends.clamp(0, last - first).int()
            tokens, weights = pairs.slots[first:last] // pairs.topk, pairs.weights[first:last]
            a = x[tokens]
            if layer.apply_router_weight_on_input:
                a = (a * weights).to(x.dtype)
            owner = pairs.experts[first:last] - some.start
            h = _product(a, w13, ends, of_each)
            h = activate(layer, _add(h.float(), tensors.get("w13_bias"), owner)).to(x.dtype)
            y = _add(_product(h, w2, ends, of_each).float(), tensors.get("w2_bias"), owner)
            if not layer.apply_router_weight_on_input:
                y *= weights
            _add_rows(total, tokens, y)


def _row_bytes(layer: ExpertLayer) -> int:
    """Return the bytes of all that `multiply` makes for one pair of a token and an expert."""
    # x, the output in 16 and 32 bits; the sums of w13 in 16 and 32 bits, and both activated.
    return 8 * layer.hidden_size + 6 * (layer.parts + 1) * layer.intermediate_size


def _chunks(
    layer: ExpertLayer, some: range, dtype: torch.dtype, scratch_bytes: int
) -> Iterator[range]:
    """Yield consecutive experts whose matrices fit in the scratch memory."""
    projections = layer.parts + 1
    expert = projections * layer.hidden_size * layer.intermediate_size * dtype.itemsize
    count = max(1, scratch_bytes // expert)
    for first in range(some.start, some.stop, count):
        yield range(first, min(first + count, some.stop))


def _product(
    a: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor, counts: list[int]
) -> torch.Tensor:
    """Multiply the rows of a [P, K] with matrices [n, N, K] -> [P, N].

    The first counts[0] rows belong to the first matrix, and so on; `ends` has the sums of `counts`.
    """
    if all(size * a.element_size() % 16 == 0 for size in matrices.shape[1:]):
        return F.grouped_mm(a, matrices.transpose(1, 2), offs=ends)
    # The grouped product requires rows that begin at multiples of 16 bytes.
    parts = a.split(counts)
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, matrices, strict=True)])


def _add(h: torch.Tensor, bias: torch.Tensor | None, owner: torch.Tensor) -> torch.Tensor:
    """Add to each row of h [P, N] the bias [E, N] of its expert; `owner` [P] has the experts."""
    return h if bias is None else h + bias[owner]


def _add_rows(total: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor) -> None:
    """Add each of `rows` [P, N] to its token's row of `total` [M, N], always in the same order."""
    if total.is_cuda:
        # This sorts the tokens; index_add_ would add the rows of a token in any order there.
        total.index_put_((tokens,), rows, accumulate=True)
    else:
        total.index_add_(0, tokens, rows)
