"""Checks the kernels of experts in Triton's interpreter, which is chosen when they are imported.

It needs a process of its own. Run it as `TRITON_INTERPRET=1 python -m tests.gpu.kernel SEED`.
"""

import sys
from typing import Any

import torch
import triton
import triton.language as tl

from lvllm.engine.weight_formats import BLOCK_FORMATS
from lvllm.gpu.kernels import block_weights, exchange, experts, split
from lvllm.gpu.kernels.codebooks import LOOKED_UP, codebook
from lvllm.gpu.pairs import Pairs
from lvllm.units import ceil_div
from tests.random_layers import ACTIVATIONS, FORMATS, FOUR_BIT, Random, random_layer

WAYS: dict[str, list[dict[str, Any]]] = {
    "fp8": [{"fp8_scale": kind} for kind in ("block", "channel", "tensor")],
    "int4": [
        {"group_size": group, "zero": zero, "scale_dtype": dtype}
        for group, zero, dtype in (
            (32, False, torch.bfloat16),
            (64, True, torch.float16),
            (128, False, torch.bfloat16),
            (-1, True, torch.float32),
        )
    ],
    "int8": [{}, {"group_size": 64, "scale_dtype": torch.float16}],
}
"""What shares a scale in formats that leave it open."""
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((format, how) for format in FORMATS for how in WAYS.get(format, [{}])),
    # The interpreter takes long for rows of whole blocks of 256, so one matrix of a layer has them.
    ("q4_k", {"w2_format": "bf16"}),
    ("bf16", {"w2_format": "q6_k"}),
    ("q5_1", {"w2_format": "iq4_nl"}),
    ("int8", {"w2_format": "q5_0", "group_size": 32}),
    ("mxfp4", {"w2_format": "q4_1"}),
    ("iq2_s", {"w2_format": "bf16"}),
    ("q5_0", {"w3_format": "q4_1", "w2_format": "bf16"}),
    ("int8", {"w3_format": "iq4_nl", "group_size": 32}),
    ("bf16", {"w3_format": "mxfp4"}),
]


def main() -> None:
    random = Random(int(sys.argv[1]))
    for number, (format, how) in enumerate(VARIANTS):
        check(random, format, how, ACTIVATIONS[number % len(ACTIVATIONS)], number)
    for format in BLOCK_FORMATS:
        check_blocks(random, format)
    check_exchange(random)
    print(f"{len(VARIANTS)} variants")


def check_exchange(random: Random) -> None:
    """Copy one to three tensors of random sizes and types."""
    for count in (1, 2, 3):
        sources = [
            random.normal(*random.integers(1, 90, 2).tolist()).to(dtype)
            for dtype in (torch.bfloat16, torch.float32, torch.int32)[:count]
        ]
        targets = [torch.empty_like(source) for source in sources]
        exchange.run(list(zip(targets, sources, strict=True)))
        if not all(map(torch.equal, targets, sources)):
            raise SystemExit(f"{[tuple(source.shape) for source in sources]}: a copy differs")


@triton.jit
def _read(  # type: ignore[no-untyped-def]
    words,
    halves,
    codebook,
    out,  # float32 [matrices, columns, rows]
    rows,
    columns,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Read a block of a tile. The grid is (matrices, tiles, blocks of columns)."""
    matrix, tile, column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * COLUMNS
    value = block_weights.read(
        words,
        halves,
        codebook,
        matrix.to(tl.int64),
        tile,
        column,
        rows,
        columns,
        FORMAT,
        ROWS,
        COLUMNS,
    )
    k, row = column + tl.arange(0, COLUMNS)[:, None], tile * ROWS + tl.arange(0, ROWS)[None, :]
    to = out + (matrix * columns + k) * rows + row
    tl.store(to, value, mask=(k < columns) & (row < rows))


def check_blocks(random: Random, format: str) -> None:
    """Read gate and up of an expert. Tiles and blocks of columns may be cut."""
    blocks, pairs = random.integers(1, 3, 1).tolist() + random.integers(1, 60, 1).tolist()
    columns, rows = blocks * BLOCK_FORMATS[format].block_weights, 2 * pairs
    layer = random_layer(random, format, 1, columns, rows, w2_format="bf16")
    stored = layer.make().tensors["w13"].view(-1)
    out = torch.full((2, columns, rows), torch.nan)
    words, halves = stored.view(torch.int32), stored.view(torch.int16)
    table = codebook(format, stored.device) if format in LOOKED_UP else words
    _read[2, ceil_div(rows, 64), ceil_div(columns, 64)](
        words, halves, table, out, rows, columns, format, 64, 64
    )
    want = layer.dequantised("w13").view(2, rows, columns).transpose(1, 2)
    compare(out, want, f"{format}, {rows} rows of {blocks} blocks")


def check(random: Random, format: str, how: dict[str, Any], activation: str, number: int) -> None:
    """Compute groups and slots of experts of a random layer, and compare with the reference."""
    # Rows are whole words of four bytes, as the kernels want them. Tiles and blocks may be cut.
    steps = [
        max(_step(format), _step(how.get("w3_format", format))),
        _step(how.get("w2_format", format)),
    ]
    most = 140 if max(steps) < 256 else 80
    hidden, intermediate = [
        step * int(random.integers(1, max(most // step, 2), 1)) for step in steps
    ]
    bias, on_input, tokens = number % 2 == 0, number % 3 == 0, 1 + number % 12 * 3
    if "w3_format" in how:  # The up rows are no matter without a gate, and have no biases.
        activation, bias = "silu", False
    layer = random_layer(
        random, format, 5, hidden, intermediate,
        activation=activation, bias=bias, apply_router_weight_on_input=on_input, **how,
    )  # fmt: skip
    engine_layer = layer.make()
    # This uses float32, since the interpreter rounds to bfloat16 by cutting bits off.
    x = random.normal(tokens, hidden)
    ids, weights = random.integers(-1, 5, tokens, 3), random.uniform(0.1, 1, tokens, 3)
    pairs = Pairs.sort(ids, weights, 5)
    total = torch.zeros(tokens, hidden)
    scratch = 20 * 4 * (hidden + intermediate)  # This holds 20 pairs.
    for some in (range(0, 2), range(2, 5)):
        tensors = {name: of[some.start : some.stop] for name, of in engine_layer.tensors.items()}
        experts.multiply(engine_layer, tensors, some, x, pairs, total, scratch_bytes=scratch)
    said = f"{format} {how} {activation} {hidden} x {intermediate}, {tokens} tokens,"
    compare(total, layer.reference(x, ids, weights), f"{said} {bias=}, {on_input=}")

    # Experts 3, 0 and 4 have slots, in this order.
    table = torch.tensor([1, -1, -1, 0, 2], dtype=torch.int32)
    slots = {name: of[[3, 0, 4]] for name, of in engine_layer.tensors.items()}
    total.zero_()
    experts.multiply_cached(engine_layer, slots, table, x, pairs, total, scratch_bytes=scratch)
    rest = split.run(ids, table)
    if not torch.equal(rest, ids.where((ids == 1) | (ids == 2), -1).int()):
        raise SystemExit(f"{ids} are split to {rest}")
    compare(total, layer.reference(x, ids.where(rest < 0, -1), weights), f"in slots: {said}")


def _step(format: str) -> int:
    """The columns of a matrix are a multiple of this."""
    if format in BLOCK_FORMATS:
        return BLOCK_FORMATS[format].block_weights
    return 8 if format in FOUR_BIT else 4


def compare(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    # Sums of float32 in another order differ by few times 2^-24 of what is added up.
    error = torch.linalg.norm(got - want) / (torch.linalg.norm(want) + 1e-6)
    if not error <= 3e-6:
        raise SystemExit(f"{what}: the relative error is {error:.2g}")


if __name__ == "__main__":
    main()
