"""Looks for damage in the weights of a layer: what no training writes, but bad files and memory do.

NaN, infinity, an expert of zeros, and an expert or a row whose size is far from its siblings'. The
engine refuses NaN and infinite scales while loading; weights may have them, and are named here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel

from lvllm.engine import ExpertLayer
from lvllm.verifying.stored import matrix

__all__ = ["Damage", "damages"]

FAR_EXPERT = 10.0
"""An expert is far from the others if its median row is so many times as large as theirs, or as
small. Those of the demo model differ by 0.68 to 1.16; no other trained model was looked at."""
FAR_ROW = 1000.0
"""The same for a row within its expert; those of the demo model differ by 0.27 to 1.95."""


class Damage(BaseModel):
    """What looks damaged."""

    matrix: str
    """"w13" (gate and up) or "w2" (down)."""
    expert: int
    what: str
    """A phrase such as `3 weights are NaN`."""


@dataclass(frozen=True)
class _Sizes:
    """Of one expert's matrix."""

    expert: int
    size: float
    """The root mean square of the weights of its median row, which one wrong row does not move."""
    rows: torch.Tensor
    """The same of each row."""


def damages(layer: ExpertLayer, experts: Sequence[int]) -> Iterator[Damage]:
    """What looks damaged in some experts of a layer, which are compared with each other."""
    for name in ("w13", "w2"):
        sizes = []
        for expert in experts:
            weights = matrix(layer, name, expert)
            if found := _not_finite(weights):
                yield Damage(matrix=name, expert=expert, what=found)
                continue
            rows = weights.square().mean(dim=1).sqrt()
            size = float(rows.median()) or float(rows.max())
            if size == 0:
                yield Damage(matrix=name, expert=expert, what="all weights are zero")
                continue
            sizes.append(_Sizes(expert, size, rows))
        for one, what in _far(sizes):
            yield Damage(matrix=name, expert=one.expert, what=what)


def _not_finite(weights: torch.Tensor) -> str | None:
    nan, infinite = int(weights.isnan().sum()), int(weights.isinf().sum())
    parts = [
        f"{count} weights are {name}" for count, name in ((nan, "NaN"), (infinite, "infinite"))
    ]
    found = [text for text, count in zip(parts, (nan, infinite), strict=True) if count]
    return " and ".join(found) or None


def _far(sizes: Sequence[_Sizes]) -> Iterator[tuple[_Sizes, str]]:
    """Experts that are far from the others, and rows that are far from their expert's others."""
    if not sizes:
        return
    median = float(torch.tensor([one.size for one in sizes]).median())
    for one in sizes:
        ratio = one.size / median
        if not 1 / FAR_EXPERT < ratio < FAR_EXPERT:
            yield one, f"its weights are {_times(ratio)} as large as those of the median expert"
            continue
        usual = float(one.rows.median())
        if usual == 0:
            continue
        ratios = one.rows / usual
        far = (ratios > FAR_ROW) | ((ratios < 1 / FAR_ROW) & (ratios > 0))
        if count := int(far.sum()):
            row = int(far.nonzero()[0])
            times = _times(float(ratios[row]))
            more = "" if count == 1 else f", and {count - 1} more rows are as far"
            yield one, f"row {row} is {times} as large as the median row{more}"


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times"
