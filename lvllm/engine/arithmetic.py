"""How the experts of each format are multiplied on this CPU, and why so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lvllm.engine.ops import raw_ops
from lvllm.engine.weight_formats import ALL_FORMATS

__all__ = ["Arithmetic", "arithmetic_of", "available_isas", "explain", "format_arithmetics"]

FACTORS = {
    "float": "floats",
    "bf16": "pairs of bf16",
    "int16": "pairs of 16-bit integers",
    "int8": "bytes",
    "bf16 tiles": "tiles of bf16",
    "int8 tiles": "tiles of bytes",
}


@dataclass(frozen=True)
class Arithmetic:
    """How the experts of a format are multiplied."""

    isa: str
    """The instruction set, one of `ISAS`."""
    name: str
    """What a weight and an activation are multiplied as, a key of `FACTORS`."""

    def __str__(self) -> str:
        return f"{FACTORS[self.name]} ({self.isa})"


def arithmetic_of(format: str, activation_bits: int) -> Arithmetic:
    """How the engine multiplies experts of `format` with activations of 8 or of 16 bits.

    Raises ValueError for a format that is none of `ALL_FORMATS`.
    """
    return Arithmetic(*raw_ops.arithmetic(format, activation_bits))


def available_isas() -> tuple[str, ...]:
    """The instruction sets of `ISAS` that this CPU has and the kernel permits."""
    return tuple(raw_ops.arithmetics("bf16", 16)[::2])  # All of them compute bf16.


def format_arithmetics() -> list[tuple[str, int, Arithmetic]]:
    """Each format, with each number of bits of activations that it allows, and its arithmetic."""
    return [
        (name, bits, arithmetic_of(name, bits))
        for name, stored in ALL_FORMATS.items()
        for bits in stored.activation_bits
    ]


def explain(format: str, activation_bits: int, rates: Mapping[Arithmetic, float]) -> str:
    """One phrase: how a format is multiplied, and how many weights a core does in a second.

    `rates` are those of `EngineInfo`. The best rate of every other arithmetic that this CPU has for
    the format stands beside it. Nothing was measured if the instruction set was given.
    """
    chosen = arithmetic_of(format, activation_bits)
    if chosen not in rates:
        return str(chosen)
    pairs = raw_ops.arithmetics(format, activation_bits)
    others = {Arithmetic(*pair) for pair in zip(pairs[::2], pairs[1::2], strict=True)}
    best: dict[str, Arithmetic] = {}
    for other in sorted(others & rates.keys(), key=rates.__getitem__):
        if other.name != chosen.name:
            best[other.name] = other
    compared = [f"{rates[other] / 1e9:.0f} as {other}" for other in best.values()]
    own = f"{chosen}, {rates[chosen] / 1e9:.0f} billion weights a second and core"
    return f"{own} ({', '.join(compared)})" if compared else own
