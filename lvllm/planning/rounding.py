"""What experts become in memory with LVLLM_MOE_USE_WEIGHT (`lvllm.moe.converted`)."""

from lvllm.engine.weight_formats import FORMATS
from lvllm.formats import gguf
from lvllm.formats.integers import INT4_BITS
from lvllm.planning.shape import ModelShape
from lvllm.settings.use_weight import UseWeight

__all__ = ["ROUNDED", "bits", "format", "is_rounded"]

ROUNDED = {UseWeight.INT4: 4, UseWeight.INT8: 8, UseWeight.FP8: 8}
"""The settings that round experts, and the bits of a weight without scales."""
SCALE_BITS = 32
"""Of the scale that each row has in INT8 and FP8."""


def is_rounded(model: ModelShape, use: UseWeight) -> bool:
    """Whether the setting changes the model's experts: those of as few bits stay as they are."""
    return use in ROUNDED and _code_bits(model.bits.format) > ROUNDED[use]


def _code_bits(format: str) -> float:
    """Bits of a weight of a format, without scales."""
    if (stored := FORMATS.get(format)) is not None:
        return 8 * stored.weight.itemsize / stored.values
    return next(held.bits for held in gguf.TYPES.values() if held.format == format)


def format(model: ModelShape, use: UseWeight) -> str:
    """The experts' format in memory, as the engine calls it."""
    return use.lower() if is_rounded(model, use) else model.bits.format


def bits(model: ModelShape, use: UseWeight) -> float:
    """Bits of an expert's weight in memory, with its share of the scales."""
    if not is_rounded(model, use):
        return model.bits.experts
    if use == UseWeight.INT4:
        return INT4_BITS
    # Of an expert's two matrices, w13 has 2 x inner rows, and w2 has as many as the hidden size.
    rows = sum(x.experts * (2 * x.inner(model.hidden) + model.hidden) for x in model.moe_layers)
    return ROUNDED[use] + SCALE_BITS * rows / model.routed
