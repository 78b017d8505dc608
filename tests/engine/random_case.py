"""An expert layer of random weights with a random batch, and how exact its result must be."""

from typing import Any

import torch

from lvllm import engine
from lvllm.engine.weight_formats import FORMATS as STORED
from tests.random_layers import FORMATS, FOUR_BIT, Random, random_layer

BOUND = {16: 3e-3, 8: 1.5e-2}
"""Relative Frobenius error by activation bits; rounding the result to bf16 alone is 1.7e-3."""

BOUND_OF_ROUNDED_X = 3.5e-3
"""Of float16 x where the CPU multiplies bf16: x is rounded as well."""


def runs_here(isa: str) -> bool:
    try:
        engine.configure(isa=isa)
    except ValueError:
        return False
    return True


ISAS = tuple(filter(runs_here, engine.ISAS))

BOTH = tuple((name, bits) for name in FORMATS for bits in sorted(STORED[name].activation_bits))
"""Every format with every width of activations it has."""


def even(format: str, size: int) -> int:
    """A size that the format allows: 4-bit formats hold two weights a byte."""
    return size + size % 2 if format in FOUR_BIT else size


class Case:
    """A layer of random weights with a random batch."""

    def __init__(
        self,
        tokens: int,
        hidden: int,
        intermediate: int,
        experts: int,
        topk: int,
        *,
        format: str = "bf16",
        x_dtype: torch.dtype = torch.bfloat16,
        skip: float = 0.0,
        seed: int = 0,
        **layer: Any,
    ) -> None:
        random = Random(seed)
        hidden, intermediate = even(format, hidden), even(format, intermediate)
        self.weights_of = random_layer(random, format, experts, hidden, intermediate, **layer)
        self.layer = self.weights_of.make()
        self.x = random.normal(tokens, hidden).to(x_dtype)
        self.ids = random.integers(0, experts, tokens, topk).int()
        self.ids[random.uniform(0, 1, tokens, topk) < skip] = -1
        self.weights = random.uniform(0.1, 1.1, tokens, topk)

    def run(self) -> torch.Tensor:
        return self.layer(self.x, self.ids, self.weights)

    def check(self) -> None:
        """The result has x's dtype and the promised accuracy.

        Errors of few values do not average out, and their sum may cancel. So below 2000 independent
        values or 32 of them a token, the bound is four times as wide and relative to outputs of the
        usual size, about 1.
        """
        got = self.run()
        assert got.dtype == self.x.dtype
        want = self.weights_of.reference(self.x, self.ids, self.weights)
        error, norm = (got.float() - want).norm(), want.norm()
        bound = BOUND[self.layer.activation_bits]
        arithmetic = engine.arithmetic_of(self.layer.format, self.layer.activation_bits)
        if self.x.dtype == torch.float16 and arithmetic.name in ("bf16", "bf16 tiles"):
            bound = max(bound, BOUND_OF_ROUNDED_X)
        active = int((self.ids >= 0).any(dim=1).sum())
        width = min(self.layer.hidden_size, self.layer.intermediate_size)
        if width < 32 or active * width < 2000:
            bound, norm = 4 * bound, norm + 0.3 * (active * self.layer.hidden_size) ** 0.5
        assert error <= bound * norm, f"relative error {error / norm:.2e}, bound {bound:.1e}"


def arguments_of(format: str, **changes: Any) -> dict[str, Any]:
    """A correct layer (2 experts, hidden 64, intermediate 32) with some arguments changed."""
    return random_layer(Random(), format, 2, 64, 32, bias=True).arguments | changes
