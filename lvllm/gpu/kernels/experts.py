"""Computes some experts of a layer for their tokens in three kernels.

`_gate_up` multiplies the tokens' rows with w13 and applies the activation. `_down` multiplies the
result with w2. Both read weights as the engine keeps them, and convert them in registers. `_add_up`
adds each token's results, times the router's weights, in the order of the token's slots. So the
sums are the same each time, which atomic additions would not give.

The experts are a group of consecutive ones, or those that have slots in a cache. What is in a cache
is known to the device alone: a graph reads the table of slots at each replay. So the host starts as
many blocks as there may be, and those without work end at once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl

from lvllm.engine.expert_layer import ExpertLayer
from lvllm.engine.tiles import TILE_ROWS, WEIGHT_UNIT
from lvllm.engine.weight_formats import ALL_FORMATS, BLOCK, BLOCK_FORMATS
from lvllm.gpu.kernels import BLOCK_ROWS, activation, blocks, weights
from lvllm.gpu.kernels.codebooks import LOOKED_UP, codebook
from lvllm.gpu.pairs import Pairs
from lvllm.units import ceil_div

__all__ = ["multiply", "multiply_cached", "prepare"]

COLUMNS = 64
"""The columns of the sum that are read at a time."""
SUMS = 1024
"""How many columns of a token's results a program adds up."""


@triton.jit(do_not_specialize=["some", "count", "first", "last"])
def _gate_up(  # type: ignore[no-untyped-def]
    x,  # [tokens, hidden]
    slots,
    router_weights,
    starts,
    table,
    some,  # the first expert
    count,
    first,
    last,
    w13,
    scale,
    zero,
    global_scale,
    bias,
    w3,
    w3_scale,
    w3_table,
    out,  # [last - first, intermediate]
    hidden,
    intermediate,
    groups,
    w3_groups,
    alpha,
    beta,
    limit,
    TOPK: tl.constexpr,
    ON_INPUT: tl.constexpr,
    CACHED: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PARTS: tl.constexpr,  # of w13
    FORMAT: tl.constexpr,
    VALUES: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    W3: tl.constexpr,  # whether the up rows are in w3
    W3_FORMAT: tl.constexpr,
    W3_VALUES: tl.constexpr,
    W3_SCALE: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute a tile of activated sums for a block of pairs. The grid is (blocks, tiles)."""
    number = tl.program_id(0)
    tile = tl.program_id(1)
    expert, begin, end = blocks.find(
        starts + some, table, count, first, last, number, CACHED, EXPERTS, ROWS
    )
    if begin >= end:
        return
    pair = begin + tl.arange(0, ROWS)
    inside = pair < end
    token = tl.load(slots + pair, mask=inside, other=0) // TOPK
    router_weight = tl.load(router_weights + pair, mask=inside, other=0)[:, None]
    gate = tl.zeros((ROWS, TILE), tl.float32)
    up = tl.zeros((ROWS, TILE), tl.float32)
    for column in range(0, hidden, COLUMNS):
        k = column + tl.arange(0, COLUMNS)[None, :]
        a = tl.load(x + token[:, None] * hidden + k, mask=inside[:, None] & (k < hidden), other=0)
        if ON_INPUT:
            a = (a * router_weight).to(x.dtype.element_ty)
        for part in tl.static_range(PARTS):
            w = weights.read(
                w13, scale, zero, global_scale, expert, part, tile, column, intermediate, hidden,
                groups, PARTS, FORMAT, VALUES, SCALE, GROUP, ZERO, TILE, COLUMNS, BLOCK,
                x.dtype.element_ty,
            )  # fmt: skip
            if GATED and part == 0:
                gate = tl.dot(a, w, gate, input_precision="ieee")
            else:
                up = tl.dot(a, w, up, input_precision="ieee")
        if W3:
            w = weights.read(
                w3, w3_scale, w3_table, global_scale, expert, 0, tile, column, intermediate, hidden,
                w3_groups, 1, W3_FORMAT, W3_VALUES, W3_SCALE, GROUP, False, TILE, COLUMNS, BLOCK,
                x.dtype.element_ty,
            )  # fmt: skip
            up = tl.dot(a, w, up, input_precision="ieee")
    row = tile * TILE + tl.arange(0, TILE)[None, :]
    within = row < intermediate
    if BIAS:
        own = bias + expert * PARTS * intermediate + row
        up += tl.load(own + (PARTS - 1) * intermediate, mask=within, other=0)
        if GATED:
            gate += tl.load(own, mask=within, other=0)
    h = activation.apply(gate, up, alpha, beta, limit, ACTIVATION)
    tl.store(
        out + (pair - first)[:, None] * intermediate + row,
        h.to(out.dtype.element_ty),
        mask=inside[:, None] & within,
    )


@triton.jit(do_not_specialize=["some", "count", "first", "last"])
def _down(  # type: ignore[no-untyped-def]
    h,  # [last - first, intermediate]
    starts,
    table,
    some,  # the first expert
    count,
    first,
    last,
    w2,
    scale,
    zero,
    global_scale,
    bias,
    out,  # float32 [last - first, hidden]
    hidden,
    intermediate,
    groups,
    CACHED: tl.constexpr,
    BIAS: tl.constexpr,
    FORMAT: tl.constexpr,
    VALUES: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute a tile of results for a block of pairs. The grid is (blocks, tiles)."""
    number = tl.program_id(0)
    tile = tl.program_id(1)
    expert, begin, end = blocks.find(
        starts + some, table, count, first, last, number, CACHED, EXPERTS, ROWS
    )
    if begin >= end:
        return
    pair = begin + tl.arange(0, ROWS)
    inside = (pair < end)[:, None]
    at = (pair - first)[:, None]
    y = tl.zeros((ROWS, TILE), tl.float32)
    for column in range(0, intermediate, COLUMNS):
        k = column + tl.arange(0, COLUMNS)[None, :]
        a = tl.load(h + at * intermediate + k, mask=inside & (k < intermediate), other=0)
        w = weights.read(
            w2, scale, zero, global_scale, expert, 0, tile, column, hidden, intermediate,
            groups, 1, FORMAT, VALUES, SCALE, GROUP, ZERO, TILE, COLUMNS, BLOCK,
            h.dtype.element_ty,
        )  # fmt: skip
        y = tl.dot(a, w, y, input_precision="ieee")
    row = tile * TILE + tl.arange(0, TILE)[None, :]
    within = row < hidden
    if BIAS:
        y += tl.load(bias + expert * hidden + row, mask=within, other=0)
    tl.store(out + at * hidden + row, y, mask=inside & within)


@triton.jit
def _computed(place, experts, table, count, first, last, CACHED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tell whether a pair has a result among those of the pairs from `first` to `last`."""
    inside = place >= first and place < last
    if CACHED:
        expert = tl.load(experts + place)
        known = expert >= 0 and expert < count
        slot = tl.load(table + expert, mask=known, other=-1)
        inside = inside and slot >= 0
    return inside


@triton.jit(do_not_specialize=["count", "first", "last"])
def _add_up(  # type: ignore[no-untyped-def]
    results,  # float32 [last - first, hidden]
    places,
    experts,  # the expert of each pair
    table,
    count,
    router_weights,
    total,
    first,
    last,
    hidden,
    TOPK: tl.constexpr,
    CACHED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add up columns of the results of one token. The grid is (tokens, blocks of columns)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = column < hidden
    some = False
    for slot in tl.static_range(TOPK):
        place = tl.load(places + token * TOPK + slot)
        some = some or _computed(place, experts, table, count, first, last, CACHED)
    if some:
        sums = tl.load(total + token * hidden + column, mask=within, other=0)
        for slot in tl.static_range(TOPK):
            place = tl.load(places + token * TOPK + slot)
            if _computed(place, experts, table, count, first, last, CACHED):
                y = tl.load(results + (place - first) * hidden + column, mask=within, other=0)
                if WEIGHTED:
                    y *= tl.load(router_weights + place)
                sums += y
        tl.store(total + token * hidden + column, sums, mask=within)


def prepare(layer: ExpertLayer, device: torch.device) -> None:
    """Do what `lvllm.gpu.products.prepare` does."""
    formats = {layer.format_of(name) for name in ("w13", "w3", "w2")}
    for format in formats & LOOKED_UP.keys():
        codebook(format, device)


def multiply(
    layer: ExpertLayer,
    tensors: Mapping[str, torch.Tensor],
    some: range,
    x: torch.Tensor,
    pairs: Pairs,
    total: torch.Tensor,
    *,
    scratch_bytes: int,
) -> None:
    """Do what `lvllm.gpu.products.multiply` does, for layers whose rows are whole words.

    The scratch memory has the results of w13, activated, and those of w2.
    """
    batch = _Batch(layer, tensors, some, None, x, pairs, total)
    begin, end = pairs.starts[some.start], pairs.starts[some.stop]
    for first, last in batch.windows(begin, end, scratch_bytes):
        bounds = [min(max(at, first), last) for at in pairs.starts[some.start : some.stop + 1]]
        counts = [stop - start for start, stop in pairwise(bounds)]
        rows = _rows((last - first) / sum(count > 0 for count in counts))
        batch.compute(first, last, rows, sum(ceil_div(count, rows) for count in counts))


def multiply_cached(
    layer: ExpertLayer,
    slots: Mapping[str, torch.Tensor],
    table: torch.Tensor,
    x: torch.Tensor,
    pairs: Pairs,
    total: torch.Tensor,
    *,
    scratch_bytes: int,
) -> None:
    """Do what `lvllm.gpu.cache.products.multiply` does, for layers whose rows are whole words.

    It may be captured in a graph, whose replays read the table.
    """
    batch = _Batch(layer, slots, range(layer.num_experts), table, x, pairs, total)
    for first, last in batch.windows(0, len(pairs.slots), scratch_bytes):
        experts = min(layer.num_experts, last - first)
        rows = _rows((last - first) / experts)
        batch.compute(first, last, rows, (last - first) // rows + experts)


def _rows(average: float) -> int:
    """Return the rows of a block for experts that have so many rows on average."""
    return next((rows for rows in BLOCK_ROWS if rows >= average), BLOCK_ROWS[-1])


@dataclass(frozen=True)
class _Batch:
    """The arguments of `multiply`, or those of `multiply_cached`."""

    layer: ExpertLayer
    tensors: Mapping[str, torch.Tensor]
    some: range
    table: torch.Tensor | None
    x: torch.Tensor
    pairs: Pairs
    total: torch.Tensor

    def windows(self, begin: int, end: int, scratch_bytes: int) -> Iterator[tuple[int, int]]:
        """Divide the pairs from `begin` to `end`, so that each part's results fit."""
        layer = self.layer
        row_bytes = layer.intermediate_size * self.x.element_size() + 4 * layer.hidden_size
        most = max(1, scratch_bytes // row_bytes)
        for first in range(begin, end, most):
            yield first, min(first + most, end)

    def compute(self, first: int, last: int, rows: int, row_blocks: int) -> None:
        """Compute the pairs from `first` to `last` in up to `row_blocks` blocks of `rows`."""
        layer, tensors, x, pairs = self.layer, self.tensors, self.x, self.pairs
        hidden, intermediate = layer.hidden_size, layer.intermediate_size
        cached = self.table is not None
        table = pairs.starts_on_device if self.table is None else self.table  # It is not read.
        h = torch.empty((last - first, intermediate), dtype=x.dtype, device=x.device)
        y = torch.empty((last - first, hidden), dtype=torch.float32, device=x.device)
        window = (table, self.some.start, len(self.some), first, last)
        shape: dict[str, Any] = {
            "CACHED": cached,
            "EXPERTS": max(16, triton.next_power_of_2(layer.num_experts)),
            "ROWS": rows,
            "num_warps": 8 if rows > 64 else 4,
        }
        alpha, beta, limit = layer.swiglu
        # This is not read, if w13 has the up rows, too.
        up = "w13" if layer.w3_format is None else "w3"
        of_up = _constants(layer, tensors, up)
        _gate_up[row_blocks, ceil_div(intermediate, TILE_ROWS)](
            x, pairs.slots, pairs.weights, pairs.starts_on_device, *window,
            *_arguments(layer, tensors, "w13"), *_arguments(layer, tensors, up)[:3],
            h, hidden, intermediate,
            _groups(tensors, "w13"), _groups(tensors, up), alpha, beta, limit,
            TOPK=pairs.topk,
            ON_INPUT=layer.apply_router_weight_on_input,
            ACTIVATION=layer.activation,
            GATED=layer.projections == 3,
            PARTS=layer.parts,
            W3=layer.w3_format is not None,
            W3_FORMAT=of_up["FORMAT"],
            W3_VALUES=of_up["VALUES"],
            W3_SCALE=of_up["SCALE"],
            **_constants(layer, tensors, "w13"),
            **shape,
        )  # fmt: skip
        _down[row_blocks, ceil_div(hidden, TILE_ROWS)](
            h, pairs.starts_on_device, *window,
            *_arguments(layer, tensors, "w2"), y, hidden, intermediate,
            _groups(tensors, "w2"),
            **_constants(layer, tensors, "w2"),
            **shape,
        )  # fmt: skip
        columns = min(SUMS, triton.next_power_of_2(hidden))
        _add_up[len(x), ceil_div(hidden, columns)](
            y, pairs.places, pairs.experts, table, layer.num_experts, pairs.weights, self.total,
            first, last, hidden,
            TOPK=pairs.topk,
            CACHED=cached,
            WEIGHTED=not layer.apply_router_weight_on_input,
            COLUMNS=columns,
        )  # fmt: skip


def _arguments(
    layer: ExpertLayer, tensors: Mapping[str, torch.Tensor], name: str
) -> list[torch.Tensor]:
    """Return the weights, scales, zero points, global scales and bias of w13, w3 or w2.

    Blocks have their scales among the weights, and some of both are halves of words: these take the
    place of the scales, and a table of the format that of the zero points.
    """
    stored = tensors[name].view(-1)
    words = stored.view(torch.int32)  # This stands for what the format has not.
    scale = tensors.get(f"{name}_scale", words)
    zero = tensors.get(f"{name}_zero", words)
    format = layer.format_of(name)
    if format in BLOCK_FORMATS:
        scale = stored.view(torch.int16)
    if format in LOOKED_UP:
        zero = codebook(format, stored.device)
    return [
        words,
        scale.view(torch.uint8) if scale.element_size() == 1 else scale,
        zero,
        tensors.get(f"{name}_global_scale", words),
        tensors.get(f"{name}_bias", words),
    ]


def _groups(tensors: Mapping[str, torch.Tensor], name: str) -> int:
    """Return the groups of a row; for scales of blocks, the blocks of a row."""
    scale = tensors.get(f"{name}_scale")
    return 1 if scale is None or scale.dim() < 3 else scale.shape[2]


def _scale_kind(format: str, scale: torch.Tensor | None) -> str:
    """Tell which weights share a scale: those of a group, a row, a block, a tensor, or none."""
    if format in BLOCK_FORMATS:
        return "in blocks"
    if scale is None:
        return "none"
    return {1: "tensor", 2: "row", 3: "block" if format == "fp8" else "group"}[scale.dim()]


def _constants(
    layer: ExpertLayer, tensors: Mapping[str, torch.Tensor], name: str
) -> dict[str, Any]:
    """Return the compile-time constants that belong to the matrix's format."""
    format = layer.format_of(name)
    stored = ALL_FORMATS[format]
    return {
        "BIAS": f"{name}_bias" in tensors,
        "FORMAT": format,
        "VALUES": WEIGHT_UNIT // stored.weight.itemsize * stored.values,
        "SCALE": _scale_kind(format, tensors.get(f"{name}_scale")),
        "GROUP": layer.group_size,
        "ZERO": f"{name}_zero" in tensors,
        "TILE": TILE_ROWS,
        "COLUMNS": COLUMNS,
        "BLOCK": BLOCK,
    }
