"""The cache of experts on the cards (LVLLM_GPU_EXPERT_CACHE): what it holds, and what it takes."""

from collections.abc import Sequence

from lvllm.gpu.cache.products import SCRATCH_BYTES
from lvllm.gpu.products import values_of_word
from lvllm.planning.shape import LayerShape, ModelShape

__all__ = ["beside_slots", "count", "expert_bytes", "has_kernels"]

SCRATCH = 2 * SCRATCH_BYTES
"""For the products of the slots' experts, in graphs and outside of them."""
TABLES = 2 * 4
"""Bytes for each expert of the cached layers: its slot, and how often it was read."""
SUM = 4
"""Bytes of a value of the sum over a token's slots."""


def expert_bytes(layers: Sequence[LayerShape], bits: float, cards: int) -> float:
    """Bytes of each card for one expert: the cards of a group hold a part each."""
    weights = sum(layer.routed for layer in layers) / sum(layer.experts for layer in layers)
    return weights * bits / 8 / cards


def count(layers: Sequence[LayerShape], bits: float, cards: int, size: float) -> int:
    """How many experts of these layers have slots in `size` bytes of each card."""
    if not layers:
        return 0
    experts = sum(layer.experts for layer in layers)
    return min(int(size / expert_bytes(layers, bits, cards)), experts)


def beside_slots(model: ModelShape, layers: Sequence[LayerShape], batch: int) -> float:
    """Bytes of each card that a cache takes beside its slots, with batches of so many tokens."""
    tables = TABLES * sum(layer.experts for layer in layers)
    return SCRATCH + tables + SUM * batch * model.hidden


def has_kernels(model: ModelShape, formats: Sequence[str], cards: int) -> bool:
    """Whether the GPU has kernels for the experts: their rows have to be whole words.

    Without kernels the host waits for the device in each layer, which a graph cannot hold
    (lvllm/gpu/products.py). Sizes that are not known are taken to be as those of published models.
    """
    sizes: list[float] = [model.hidden]
    if model.rows is not None:
        # Otherwise each card has whole experts.
        sizes.append(model.rows / cards if model.divides_blocks(cards) else model.rows)
    return all(size % values_of_word(name) == 0 for name in formats for size in sizes)
