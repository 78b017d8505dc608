"""Random weights in every format, which are made quickly, and their values in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.cases import Batch, Shape
from lvllm.engine import dequantize
from lvllm.engine.weight_formats import BLOCK_FORMATS

GROUP_SIZE = 32  # Weights of int4 along K that share a scale.
FP8_BLOCK = 128
REFERENCE_WEIGHTS = 100_000_000  # Dequantising this many for a reference takes about a second.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_RMS = 2.9
FORMATS = ("bf16", "fp16", "fp8", "int8", "int4", "mxfp4", "nvfp4", *BLOCK_FORMATS)
FACTORS: dict[str, dict[int, float]] = {
    "q2_k": {80: 1, 82: 1.5},
    "q3_k": {108: 1},
    "q4_k": {0: 1, 2: 7.5},
    "q5_k": {0: 1, 2: 15.5},
    "q6_k": {208: 1},
    "q4_1": {0: 1, 2: -7.5},
    "q5_0": {0: 1},
    "q5_1": {0: 1, 2: -15.5},
    "iq4_nl": {0: 1},
    "iq4_xs": {0: 1},
    "iq1_s": {0: 1},
    "iq1_m": {},  # in four parts
    "iq2_xxs": {0: 1},
    "iq2_xs": {0: 1},
    "iq2_s": {0: 1},
    "iq3_xxs": {0: 1},
    "iq3_s": {0: 1},
}
"""Where a block has the float16 factors of its scales and of its minimums, and how large the latter
are, so that weights are about as often negative as positive."""
SPREAD = {
    **{"q2_k": 12, "q3_k": 42, "q4_k": 220, "q5_k": 430, "q6_k": 1400},
    **{"q4_1": 4.6, "q5_0": 9.2, "q5_1": 9.2, "iq4_nl": 71, "iq4_xs": 1320},
    **{"iq1_s": 7.6, "iq1_m": 7.6, "iq2_xxs": 55, "iq2_xs": 58, "iq2_s": 58},
    **{"iq3_xxs": 146, "iq3_s": 145},
}
"""The deviation of a random block's weights where the factor of its scales is 1."""

Allocate = Callable[[tuple[int, ...], torch.dtype, int], torch.Tensor]
"""Allocates a tensor of a shape, a dtype, and a number of parts: 2 for w13, 1 for w2."""


def torch_allocate(shape: tuple[int, ...], dtype: torch.dtype, parts: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


@dataclass(frozen=True)
class Pattern:
    """A tensor [E, ...] that repeats a block of values.

    Drawing every value of a large layer would take a minute. The values of an expert can be read
    here even when the tensor's owner has reordered it.
    """

    shape: tuple[int, ...]
    block: torch.Tensor
    parts: int

    def tensor(self, allocate: Allocate) -> torch.Tensor:
        tensor = allocate(self.shape, self.block.dtype, self.parts)
        flat, size = tensor.view(-1), self.block.numel()
        for begin in range(0, flat.numel(), size):
            end = min(begin + size, flat.numel())
            flat[begin:end] = self.block[: end - begin]
        return tensor

    def expert(self, index: int) -> torch.Tensor:
        size = math.prod(self.shape[1:])
        where = torch.arange(index * size, (index + 1) * size) % self.block.numel()
        return self.block[where].view(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.block.element_size()


def _block_size(shape: tuple[int, ...]) -> int:
    # The block is no multiple of a row, so that rows differ.
    return min(math.prod(shape), (8 << 20) + 7)


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(_block_size(shape), generator=generator).mul_(std)


def _bytes(shape: tuple[int, ...], low: int, high: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(low, high, (_block_size(shape),), generator=generator, dtype=torch.uint8)


def _scales(shape: tuple[int, ...], mean: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(_block_size(shape), generator=generator).add_(0.5).mul_(mean)


def random_blocks(
    format: str, count: int, std: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Blocks of random bits, whose weights have about this deviation: uint8 [count, bytes]."""
    size = (count, BLOCK_FORMATS[format].block_bytes)
    blocks = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    scale = torch.rand(count, generator=generator).add_(0.5).mul_(std / SPREAD[format])
    for at, factor in FACTORS[format].items():
        blocks[:, at : at + 2] = (scale * factor).half().unsqueeze(-1).view(torch.uint8)
    if format == "iq1_m":
        quarters = scale.half().view(torch.int16).unsqueeze(-1) >> torch.arange(0, 16, 4) & 15
        blocks[:, 49::2] = (blocks[:, 49::2] & 15) | quarters.to(torch.uint8) << 4
    return blocks


def _matrix(
    format: str, experts: int, rows: int, columns: int, generator: torch.Generator
) -> dict[str, tuple[tuple[int, ...], torch.Tensor]]:
    """Shapes and values of the weights ("") and scales ("_scale") of w13 or w2.

    The weights' values have a variance of about 1/columns, so that outputs are near 1.
    """
    std = columns**-0.5
    full = (experts, rows, columns)
    nibbles = (experts, rows, columns // 2)

    def groups(size: int) -> tuple[int, ...]:
        return (experts, rows, -(-columns // size))

    match format:
        case "bf16" | "fp16":
            dtype = torch.bfloat16 if format == "bf16" else torch.float16
            return {"": (full, _normal(full, std, generator).to(dtype))}
        case "fp8":
            blocks = (experts, -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
            # The largest number of e4m3 is 448; beyond it is NaN.
            values = _normal(full, 64.0, generator).clamp_(-440, 440)
            return {
                "": (full, values.to(torch.float8_e4m3fn)),
                "_scale": (blocks, _scales(blocks, std / 64, generator)),
            }
        case "int8":
            values = _normal(full, 32.0, generator).round_().clamp_(-127, 127)
            return {
                "": (full, values.to(torch.int8)),
                "_scale": (full[:2], _scales(full[:2], std / 32, generator)),
            }
        case "int4":
            group = groups(GROUP_SIZE)
            return {
                "": (nibbles, _bytes(nibbles, 0, 256, generator)),
                # 4.6 is the standard deviation of a uniform nibble.
                "_scale": (group, _scales(group, std / 4.6, generator).bfloat16()),
            }
        case "mxfp4":
            group = groups(32)
            exponent = 127 + round(math.log2(std / E2M1_RMS))
            return {
                "": (nibbles, _bytes(nibbles, 0, 256, generator)),
                "_scale": (group, _bytes(group, exponent - 1, exponent + 2, generator)),
            }
        case "nvfp4":
            group = groups(16)
            return {
                "": (nibbles, _bytes(nibbles, 0, 256, generator)),
                "_scale": (group, _scales(group, 32.0, generator).to(torch.float8_e4m3fn)),
            }
    size = BLOCK_FORMATS[format].block_bytes
    raw = (experts, rows, BLOCK_FORMATS[format].elements(columns))
    drawn = random_blocks(format, min(math.prod(raw), 8 << 20) // size, std, generator)
    return {"": (raw, drawn.flatten())}


class RandomWeights:
    """The weights of one layer.

    The keys of `patterns` are the arguments of `lvllm.engine.ExpertLayer`.
    """

    def __init__(self, shape: Shape, format: str, seed: int) -> None:
        self.shape, self.format = shape, format
        generator = torch.Generator().manual_seed(seed)
        self.patterns: dict[str, Pattern] = {}
        for name, parts, rows, columns in (
            ("w13", 2, 2 * shape.intermediate, shape.hidden),
            ("w2", 1, shape.hidden, shape.intermediate),
        ):
            tensors = _matrix(format, shape.experts, rows, columns, generator)
            for suffix, (size, block) in tensors.items():
                self.patterns[name + suffix] = Pattern(size, block, parts)
            if format == "nvfp4":
                size = (shape.experts, 2) if parts == 2 else (shape.experts,)
                scale = _scales(size, columns**-0.5 / E2M1_RMS / 32, generator)
                self.patterns[name + "_global_scale"] = Pattern(size, scale, 1)

    @property
    def nbytes(self) -> int:
        return sum(pattern.nbytes for pattern in self.patterns.values())

    def tensors(self, allocate: Allocate = torch_allocate) -> dict[str, torch.Tensor]:
        return {name: pattern.tensor(allocate) for name, pattern in self.patterns.items()}

    def expert(self, name: str, index: int) -> torch.Tensor:
        """The values of w13 or w2 of one expert in float32."""
        weight = self.patterns[name].expert(index)
        scale = self.patterns.get(name + "_scale")
        if self.format in BLOCK_FORMATS:
            return dequantize.values({"format": self.format, name: weight.unsqueeze(0)}, name, 0)
        if scale is None:
            return weight.float()
        scales = scale.expert(index)
        match self.format:
            case "fp8":
                return (
                    weight.float()
                    * _spread(_spread(scales, FP8_BLOCK, 0), FP8_BLOCK, 1)[
                        : weight.shape[0], : weight.shape[1]
                    ]
                )
            case "int8":
                return weight.float() * scales[:, None]
            case "int4":
                values = _nibbles(weight).float() - 8
                return values * _spread(scales.float(), GROUP_SIZE, 1)[:, : values.shape[1]]
        values = torch.tensor([*E2M1, *(-v for v in E2M1)])[_nibbles(weight).long()]
        if self.format == "mxfp4":
            return values * _spread(torch.exp2(scales.float() - 127), 32, 1)[:, : values.shape[1]]
        both = self.patterns[name + "_global_scale"].expert(index).view(-1)
        factor = both.repeat_interleave(values.shape[0] // both.numel())[:, None]
        return values * _spread(scales.float(), 16, 1)[:, : values.shape[1]] * factor


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _spread(scales: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    return scales.repeat_interleave(size, dim)


def layer_bytes(shape: Shape, format: str) -> int:
    """Bytes of a layer's weights and scales."""
    one = Shape(shape.hidden, shape.intermediate, 1, 1)
    return RandomWeights(one, format, 0).nbytes * shape.experts


def input_dtype(format: str) -> torch.dtype:
    return torch.float16 if format == "fp16" else torch.bfloat16


def relative_error(weights: RandomWeights, batch: Batch, out: torch.Tensor) -> float:
    """The relative Frobenius error of a few tokens' outputs against float32."""
    shape = weights.shape
    affordable = max(1, REFERENCE_WEIGHTS // (shape.topk * shape.expert_weights))
    count = min(4, affordable, batch.x.shape[0])
    rows = torch.linspace(0, batch.x.shape[0] - 1, count).long()
    ids, routing = batch.ids[rows], batch.weights[rows]
    x = batch.x[rows].float()
    wanted = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, slot = torch.where(ids == expert)
        gate, up = (x[token] @ weights.expert("w13", expert).T).chunk(2, dim=-1)
        down = (torch.nn.functional.silu(gate) * up) @ weights.expert("w2", expert).T
        wanted.index_add_(0, token, down * routing[token, slot, None])
    return float((out[rows].float() - wanted).norm() / wanted.norm())
