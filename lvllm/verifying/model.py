"""Verifies all layers of experts of a process."""

import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Self

import torch
from pydantic import BaseModel

from lvllm.engine import ExpertLayer, available_isas
from lvllm.errors import LayerError
from lvllm.verifying.layer import Product, products
from lvllm.verifying.stored import matrix
from lvllm.verifying.weights import Damage, damages

__all__ = ["LayerReport", "quickly", "verify"]

SAME = 1e-5
"""Scales and codes are multiplied in another order, which makes 1e-7. A code that is wrong by one
makes 2e-3 in 8 bits, and more in fewer."""
EXPERTS = 4
"""How many experts of a layer are multiplied."""
QUICK_SECONDS = 20.0
"""After so many seconds, a quick verification leaves out what remains."""

OfFile = Callable[[str, str, int], torch.Tensor | None]
"""Gives the matrix "w13" or "w2", float32 [rows, columns], of a layer's expert as a file has it."""


class LayerReport(BaseModel):
    """What was found about one layer."""

    name: str
    format: str
    products: list[Product]
    damages: list[Damage]
    from_file: float | None = None
    """The largest difference of a weight from the value that the file has, divided by the largest
    weight of the expert; None: the file was not compared."""

    @classmethod
    def of(
        cls,
        name: str,
        layer: ExpertLayer,
        products: Iterable[Product],
        damages: Iterable[Damage],
        from_file: float | None = None,
    ) -> Self:
        """The report about `layer`, which the model calls `name`."""
        formats = dict.fromkeys(layer.format_of(name) for name in ("w13", "w3", "w2"))
        return cls(
            name=name,
            format=" and ".join(formats),
            products=list(products),
            damages=list(damages),
            from_file=from_file,
        )

    @property
    def worst(self) -> Product:
        """The comparison that came nearest to its bound, or went farthest beyond it."""
        return max(self.products, key=lambda one: one.error / one.bound)

    @property
    def wrong(self) -> str | None:
        """One line about what is wrong; None if nothing is."""
        if self.damages:
            first, more = self.damages[0], len(self.damages) - 1
            others = f"; {more} more experts look damaged" if more else ""
            return f"{self.name}: expert {first.expert}, {first.matrix}: {first.what}{others}"
        if self.from_file is not None and not self.from_file <= SAME:
            return (
                f"{self.name}: weights in {self.format} differ from those of the file by"
                f" {self.from_file:.1e} of the largest, and {SAME:.1e} is allowed"
            )
        if not self.products or self.worst.right:
            return None
        worst = self.worst
        return (
            f"{self.name}: {self.format} experts on {worst.isa} with {worst.tokens} tokens differ"
            f" by {worst.error:.1e} from float32, and {worst.bound:.1e} is allowed"
        )


def verify(layers: Mapping[str, ExpertLayer], of_file: OfFile | None = None) -> list[LayerReport]:
    """Multiply some experts of each layer on every instruction set, and look at all weights.

    The weights of the same experts are compared with those that `of_file` gives.
    """
    reports = []
    for name, layer in layers.items():
        every = range(layer.num_experts)
        chosen = sorted(random.sample(every, min(EXPERTS, len(every))))
        found = products(layer, chosen, available_isas())
        far = None if of_file is None else _from_file(name, layer, chosen, of_file)
        reports.append(LayerReport.of(name, layer, found, damages(layer, every), far))
    return reports


def _from_file(
    name: str, layer: ExpertLayer, experts: Iterable[int], of_file: OfFile
) -> float | None:
    """What `LayerReport.from_file` says; None if the engine has all weights in other formats."""
    far = []
    for expert in experts:
        for which in ("w13", "w2"):
            wanted = of_file(name, which, expert)
            if wanted is None:
                continue
            difference = (matrix(layer, which, expert) - wanted).abs().max() / wanted.abs().max()
            far.append(float(difference.nan_to_num(1e9, 1e9)))
    return max(far, default=None)


def quickly(layers: Mapping[str, ExpertLayer], seconds: float = QUICK_SECONDS) -> str:
    """Multiply two experts of each layer as the engine will, and then look at weights.

    What is not done after `seconds` is left out. Layers come in random order, so that none is left
    out at every start. Returns a line about what was seen. Raises LayerError at the first layer
    that is wrong.
    """
    begin = time.monotonic()
    order = random.sample(sorted(layers), len(layers))
    worst, multiplied, looked_at = 0.0, 0, 0
    for name in order:
        if time.monotonic() - begin > seconds:
            break
        layer = layers[name]
        chosen = random.sample(range(layer.num_experts), min(2, layer.num_experts))
        found = list(products(layer, chosen, [None]))
        worst = max(worst, _sound(LayerReport.of(name, layer, found, [])).worst.error)
        multiplied += 1
    for name in order:
        if time.monotonic() - begin > seconds:
            break
        layer = layers[name]
        _sound(LayerReport.of(name, layer, [], damages(layer, range(layer.num_experts))))
        looked_at += 1
    return (
        f"of {len(layers)} layers, {multiplied} were compared with float32 (worst error"
        f" {worst:.1e}), and the weights of {looked_at} were looked at, in"
        f" {time.monotonic() - begin:.1f} s"
    )


def _sound(report: LayerReport) -> LayerReport:
    if report.wrong is not None:
        raise LayerError(report.wrong)
    return report
