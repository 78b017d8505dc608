"""The products of some experts of a layer with their tokens, on a device.

Triton kernels compute them on a GPU (lvllm/gpu/kernels). Elsewhere, and for rows of an odd number
of bytes, the experts are converted to plain matrices of the model's dtype, a few at a time, and
multiplied by PyTorch. The scratch memory is bounded: the rows of 32 thousand tokens may take ten
times as much, and so may the matrices of all experts of a layer.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch

from lvllm.engine.activations import activate
from lvllm.engine.expert_layer import ExpertLayer
from lvllm.engine.tiles import WEIGHT_UNIT
from lvllm.engine.weight_formats import ALL_FORMATS
from lvllm.gpu.convert import convert
from lvllm.gpu.pairs import Pairs

__all__ = [
    "SCRATCH_BYTES",
    "has_whole_words",
    "multiply",
    "prepare",
    "require_whole_words",
    "values_of_word",
]

SCRATCH_BYTES = 512 << 20
"""The limit of converted matrices at a time, and that of rows at a time. Writing this much takes
0.1 ms, and starting the few kernels takes 20 us."""


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
    if x.is_cuda and has_whole_words(layer):
        from lvllm.gpu.kernels import experts

        experts.multiply(layer, tensors, some, x, pairs, total, scratch_bytes=scratch_bytes)
        return
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
            tokens, weights = pairs.slots[first:last] // pairs.topk, pairs.weights[first:last]
            a = x[tokens]
            if layer.apply_router_weight_on_input:
                a = (a * weights).to(x.dtype)
            owner = pairs.experts[first:last] - some.start
            h = _product(a, w13, of_each)
            h = activate(layer, _add(h.float(), tensors.get("w13_bias"), owner)).to(x.dtype)
            y = _add(_product(h, w2, of_each).float(), tensors.get("w2_bias"), owner)
            if not layer.apply_router_weight_on_input:
                y *= weights
            _add_rows(total, tokens, y)


def prepare(layer: ExpertLayer, device: torch.device) -> None:
    """Bring the tables of the layer's formats to the device, which a graph cannot do later."""
    if device.type == "cuda" and has_whole_words(layer):
        from lvllm.gpu.kernels import experts

        experts.prepare(layer, device)


def has_whole_words(layer: ExpertLayer) -> bool:
    """Tell whether all rows of the layer's matrices are whole words, as the kernels want them.

    Those of all published models are. Rows of blocks may have half a word more, but then there is
    an even number of them.
    """
    return _odd_rows(layer) is None


def require_whole_words(layer: ExpertLayer, device: torch.device) -> None:
    """Raise ValueError on a GPU, unless the kernels compute the layer.

    PyTorch would compute it otherwise, for which the host waits for the device. A graph cannot.
    """
    if device.type == "cuda" and (odd := _odd_rows(layer)) is not None:
        raise ValueError(f"the GPU's kernels want rows of whole words, but {odd}")


def _odd_rows(layer: ExpertLayer) -> str | None:
    """Describe rows of the layer that are no whole words; None: all are."""
    for name, columns in (
        ("w13", layer.hidden_size),
        ("w3", layer.hidden_size),
        ("w2", layer.intermediate_size),
    ):
        format = layer.format_of(name)
        if columns % (values := values_of_word(format)):
            return (
                f"those of {name} have {columns} weights in {format}; allowed is a multiple of"
                f" {values}"
            )
    return None


def values_of_word(format: str) -> int:
    """Return how many weights of a row a word has; in formats of blocks, those of a block."""
    stored = ALL_FORMATS[format]
    return (
        stored.unit if stored.block_bytes else WEIGHT_UNIT // stored.weight.itemsize * stored.values
    )


def _row_bytes(layer: ExpertLayer) -> int:
    """Return the bytes of all that `multiply` makes for one pair of a token and an expert."""
    # x, the output in 16 and 32 bits; the sums of w13 in 16 and 32 bits, and both activated.
    return 8 * layer.hidden_size + 6 * layer.projections * layer.intermediate_size


def _chunks(
    layer: ExpertLayer, some: range, dtype: torch.dtype, scratch_bytes: int
) -> Iterator[range]:
    """Yield consecutive experts whose matrices fit in the scratch memory."""
    expert = layer.projections * layer.hidden_size * layer.intermediate_size * dtype.itemsize
    count = max(1, scratch_bytes // expert)
    for first in range(some.start, some.stop, count):
        yield range(first, min(first + count, some.stop))


def _product(a: torch.Tensor, matrices: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Multiply the rows of a [P, K] with matrices [n, N, K] -> [P, N].

    The first counts[0] rows belong to the first matrix, and so on.
    """
    parts = zip(a.split(counts), matrices, strict=True)
    return torch.cat([part @ matrix.T for part, matrix in parts])


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
