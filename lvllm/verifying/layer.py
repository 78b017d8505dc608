"""Compares what the engine computes for a layer with a reference in float32.

Batches have the sizes at which the engine takes different ways: one token, a few tokens for each
expert, and many.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from pydantic import BaseModel

from lvllm.engine import ExpertLayer, arithmetic_of, on_isa
from lvllm.verifying.reference import expert_block

__all__ = ["PROMISED", "Product", "bound", "products"]

PROMISED = {16: 3.5e-3, 8: 1.5e-2}
"""The relative error that `ExpertLayer` stays below, by the bits of activations."""
MANY_VALUES = 2000
"""Errors of fewer values do not average out."""
TOKENS = (1, 7, 96)
"""With two experts for a token among four, 96 tokens give each of them 48."""


class Product(BaseModel):
    """One comparison."""

    isa: str
    tokens: int
    error: float
    """The norm of the difference, divided by that of the reference or, if it is larger, by that of
    outputs of the usual size; 1e9 if that is no number."""
    bound: float

    @property
    def right(self) -> bool:
        return self.error <= self.bound


def bound(activation_bits: int, values: int) -> float:
    """The error that is allowed for so many outputs: twice what is promised, or four times for few.

    A wrong kernel or weight makes errors of 5% and more.
    """
    return PROMISED[activation_bits] * (2 if values >= MANY_VALUES else 4)


def products(
    layer: ExpertLayer, experts: Sequence[int], isas: Sequence[str | None]
) -> Iterator[Product]:
    """Compare the layer with float32, for some of its experts, on each instruction set.

    None stands for what the engine chose. x is bfloat16 and random. Other layers must not run
    meanwhile.
    """
    random = torch.Generator()
    random.seed()
    topk = min(2, len(experts))
    batches = []
    for tokens in TOKENS:
        x = torch.randn(tokens, layer.hidden_size, generator=random).bfloat16()
        order = torch.rand(tokens, len(experts), generator=random).argsort(dim=1)[:, :topk]
        ids = torch.tensor(experts, dtype=torch.int32)[order].contiguous()
        weights = torch.rand(tokens, topk, generator=random) + 0.1
        batches.append((x, ids, weights, expert_block(layer, x, ids, weights)))
    bits = (layer.activation_bits, layer.w3_activation_bits, layer.w2_activation_bits)
    # The outputs of one token may cancel out, so errors are also measured by the usual size.
    usual = float(batches[-1][3].square().mean().sqrt())
    for isa in isas:
        with nullcontext() if isa is None else on_isa(isa):
            name = arithmetic_of(layer.format, layer.activation_bits).isa
            for x, ids, weights, want in batches:
                got = layer(x, ids, weights).float()
                size = max(float(want.norm()), usual * want.numel() ** 0.5)
                error = float((got - want).norm()) / size if size else 1e9
                yield Product(
                    isa=name,
                    tokens=len(x),
                    error=error if error < 1e9 else 1e9,  # NaN, too
                    bound=bound(min(bits), want.numel()),
                )
