"""The bits of a weight in GGUF files, and the engine's format that comes nearest."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from lvllm.checkpoint.gguf.architectures import ARCHITECTURES
from lvllm.checkpoint.gguf_headers import GgufTensor
from lvllm.errors import quoted
from lvllm.formats.gguf import TYPES
from lvllm.formats.integers import INT4_BITS
from lvllm.planning.bits import GROUP_SCALES, Bits, FormatShare

__all__ = ["Stored", "bits_of", "size_of"]

FLOATS = ("F64", "F32", "F16", "BF16")
SAME = {
    "MXFP4": "mxfp4",
    "NVFP4": "nvfp4",
    "F16": "fp16",
    **dict.fromkeys(("BF16", "F32", "F64"), "bf16"),
}
"""The formats of checkpoints that hold the values of a type."""
MOST_FOR_INT4 = 5.0
"""Other types of up to so many bits become int4: Q4_1 has 5 with a scale and a minimum of each
block, and the types with 5 bits of codes have 5.5."""
LEAST = {
    "int4": INT4_BITS,
    "int8": 8.0,
    "bf16": 16.0,
    "fp16": 16.0,
    **{name: 4 + scale for name, scale in GROUP_SCALES.items()},
}
"""Bits of a weight in checkpoints of a format, with its share of the scales."""


@dataclass(frozen=True)
class Stored:
    """How GGUF files store the routed experts."""

    types: tuple[str, ...]
    """ggml's types, that of most weights first."""
    bits: float
    architecture: str
    """ggml's name of the model's family."""

    @property
    def unserved(self) -> str | None:
        """Why LvLLM does not serve the files; None if it does."""
        if self.architecture not in ARCHITECTURES:
            return f"GGUF files of the architecture {quoted(self.architecture)}"
        wrong = [name for name in self.types if name not in TYPES]
        return f"experts in {' and '.join(wrong)}" if wrong else None


def size_of(tensors: Collection[GgufTensor]) -> float:
    """Bytes of tensors, of which vLLM holds floats in 16 bits."""
    return sum(2 * x.weights if x.type in FLOATS else x.nbytes for x in tensors)


def bits_of(
    experts: Collection[GgufTensor],
    routed: int,
    others: Collection[GgufTensor],
    rest: int,
    architecture: str,
) -> tuple[Bits, Stored]:
    """The bits to plan with, and what the files have.

    The experts' format is that of the type that most of their weights have. Experts that are served
    have the bits that they take in memory. For others, a checkpoint in the nearest format is
    planned, which has at least LEAST bits a weight.

    Args:
        routed: how many weights the experts have.
        rest: how many the others have.
        architecture: ggml's name of the model's family.
    """
    count: Counter[str] = Counter()
    # Biases are floats whatever the weights are.
    for tensor in [x for x in experts if x.name.endswith(".weight")] or experts:
        count[tensor.type] += tensor.weights
    types = tuple(name for name, _ in count.most_common())
    stored = 8 * size_of(experts) / routed
    of_file = Stored(types, stored, architecture)
    if of_file.unserved:
        most = next(x for x in experts if x.type == types[0])
        nearest = "int4" if 8 * most.nbytes / most.weights <= MOST_FOR_INT4 else "int8"
        format = SAME.get(most.type, nearest)
        return Bits(format, max(stored, LEAST[format]), 8 * size_of(others) / rest), of_file
    held = sum(TYPES[x.type].memory_bits * x.weights for x in experts) / routed
    parts = tuple(
        FormatShare(TYPES[name].format or "bf16", weights / count.total(), TYPES[name].memory_bits)
        for name, weights in count.most_common()
    )
    # All but the experts become 16 bits.
    others_bits = 16 * sum(x.weights for x in others) / rest
    block = max(TYPES[name].weights for name in types)
    return Bits(parts[0].format, held, others_bits, parts, block), of_file
