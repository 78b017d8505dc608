"""Verifies all layers of experts of a process."""

import random
import time
from collections.abc import Iterable, Mapping
from typing import Self

from pydantic import BaseModel

from lvllm.engine import ExpertLayer, available_isas
from lvllm.errors import LayerError
from lvllm.verifying.layer import Product, products
from lvllm.verifying.weights import Damage, damages

__all__ = ["LayerReport", "quickly", "verify"]

EXPERTS = 4
"""How many experts of a layer are multiplied."""
QUICK_SECONDS = 20.0
"""After so many seconds, a quick verification leaves out what remains."""


class LayerReport(BaseModel):
    """What was found about one layer."""

    name: str
    format: str
    products: list[Product]
    damages: list[Damage]

    @classmethod
    def of(
        cls,
        name: str,
        layer: ExpertLayer,
        products: Iterable[Product],
        damages: Iterable[Damage],
    ) -> Self:
        """The report about `layer`, which the model calls `name`."""
        return cls(name=name, format=layer.format, products=list(products), damages=list(damages))

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
        if not self.products or self.worst.right:
            return None
        worst = self.worst
        return (
            f"{self.name}: {self.format} experts on {worst.isa} with {worst.tokens} tokens differ"
            f" by {worst.error:.1e} from float32, and {worst.bound:.1e} is allowed"
        )


def verify(layers: Mapping[str, ExpertLayer]) -> list[LayerReport]:
    """Multiply some experts of each layer on every instruction set, and look at all weights."""
    reports = []
    for name, layer in layers.items():
        every = range(layer.num_experts)
        chosen = sorted(random.sample(every, min(EXPERTS, len(every))))
        found = products(layer, chosen, available_isas())
        reports.append(LayerReport.of(name, layer, found, damages(layer, every)))
    return reports


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
