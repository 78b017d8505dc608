"""The order in which the engine keeps weights, group scales and zero points, in plain PyTorch.

An engine layer reorders its tensors in place. This module does the same on any device, so that a
GPU can undo it after the copy. The bytes stay the same, and only their order differs:

- The rows of a matrix are its parts, one after the other: for w13 the gate rows and the up rows.
- Each part is cut in tiles of 64 rows; the last one may have fewer.
- A row is cut in units: 4 bytes of weights, or one element of scales or zero points. A tile of n
  rows holds unit 0 of its n rows, then unit 1 of its n rows, and so on. If a row is no whole number
  of units, the leftover bytes of each row follow, row after row.

Interleaved rows (gate 0, up 0, gate 1, ...) are separated, with the gate rows first, and so are
their row scales and float32 biases. Otherwise row scales, biases, and the scales of blocks and of
tensors stay as they are.

With this order 64 consecutive bytes, a vector register of AVX-512, hold 4 bytes along K of each of
16 outputs. Each output is then summed in its own element of a vector.
"""

from collections.abc import Iterator

import torch

__all__ = ["TILE_ROWS", "WEIGHT_UNIT", "from_tiles", "to_tiles"]

TILE_ROWS = 64
WEIGHT_UNIT = 4
"""How many bytes of a weight row stay together."""


def to_tiles(
    tensor: torch.Tensor,
    parts: int = 1,
    unit_bytes: int = WEIGHT_UNIT,
    *,
    interleaved: bool = False,
) -> torch.Tensor:
    """A copy of a row-major tensor whose memory is in the engine's order.

    Args:
        tensor: [E, rows, columns] of any dtype, contiguous. The result has the same shape and
            dtype, although its indices no longer say where an element belongs.
        parts: the number of matrices that follow each other in the rows: 2 for w13 of a gated
            activation and its scales, else 1.
        unit_bytes: 4 for weights, the size of an element for scales and zero points.
        interleaved: whether the rows are gate 0, up 0, gate 1, up 1, ..., with 2 parts. The result
            has the gate rows first.
    """
    tiles = torch.empty_like(tensor)
    for row_view, tile_view in _views(tensor, tiles, parts, unit_bytes, interleaved):
        tile_view.copy_(row_view)
    return tiles


def from_tiles(
    tiles: torch.Tensor,
    parts: int = 1,
    unit_bytes: int = WEIGHT_UNIT,
    *,
    interleaved: bool = False,
) -> torch.Tensor:
    """The inverse of `to_tiles`: a row-major copy of a tensor in the engine's order."""
    rows = torch.empty_like(tiles)
    for row_view, tile_view in _views(rows, tiles, parts, unit_bytes, interleaved):
        row_view.copy_(tile_view)
    return rows


def _views(
    rows: torch.Tensor, tiles: torch.Tensor, parts: int, unit_bytes: int, interleaved: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of views of equal shape that show the same weights in both orders."""
    experts, all_rows, columns = rows.shape
    row_bytes = columns * rows.element_size()
    # A unit is copied as one integer, or byte by byte if rows are no whole number of units.
    step = 1 if row_bytes % unit_bytes else unit_bytes
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[step]
    unit, length, part_rows = unit_bytes // step, row_bytes // step, all_rows // parts
    units = length // unit
    body = units * unit

    by_part = (part_rows, parts) if interleaved else (parts, part_rows)
    source = rows.view(integer).unflatten(1, by_part)
    if interleaved:
        source = source.transpose(1, 2)
    target = tiles.view(integer).view(experts, parts, part_rows * length)
    whole = part_rows // TILE_ROWS
    for first, count, n in (
        (0, whole, TILE_ROWS),
        (whole * TILE_ROWS, 1, part_rows % TILE_ROWS),
    ):
        if count * n == 0:
            continue
        last = first + count * n
        r = source[:, :, first:last].unflatten(2, (count, n))
        t = target[:, :, first * length : last * length].unflatten(2, (count, n * length))
        if units:
            yield (
                r[..., :body].unflatten(-1, (units, unit)),
                t[..., : n * body].unflatten(-1, (units, n, unit)).transpose(-3, -2),
            )
        if body < length:
            yield r[..., body:], t[..., n * body :].unflatten(-1, (n, length - body))
