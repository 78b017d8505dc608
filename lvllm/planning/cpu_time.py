"""How long CPUs take for parts of a pass. The constants were measured with `benchmarks/`.

A part takes as long as the slower of two: reading its weights, and multiplying.
"""

from lvllm.planning.machine import Machine
from lvllm.planning.placement import Placement
from lvllm.planning.shape import LayerShape, ModelShape

__all__ = ["Seconds", "attention", "experts", "linear", "steps"]

Seconds = dict[str, float]
"""Seconds by what they are spent on and, after a colon, by what limits them."""

READ = 0.88
"""The share of the read bandwidth that the engine reaches with few tokens; 87 to 95% were
measured."""
FEW_TOKENS = 0.65
"""The share of the rate with many tokens that is reached with fewer than 16 tokens an expert. With
4 tokens, 0.59 to 0.69 were measured on Zen 3 and Zen 5."""
STEP = 4e-3
"""vLLM's scheduler, sampling and Python for a step, in seconds."""
LAYER = 0.5e-3
"""vLLM's operators around the experts for each layer, without compilation. Both were taken from a
model of 5 layers."""
ATTENTION = 0.57
"""The share of the rate of bf16 products that attention by vLLM's CPU kernels reaches: 20 billion a
second and core on Zen 3."""
ATTENTION_CORES = 64
"""With more cores, attention is not expected to become faster: its heads are divided among them."""
SHARED_CORES = 4
"""With so many cores or fewer, the engine takes all of them, and the front process of vLLM, which
reads prompts and sends tokens, has none of its own. Otherwise it works beside the engine."""
FRONT_STEP = 2.7e-3
FRONT_TOKEN = 0.43e-3
FRONT_PROMPT_TOKEN = 0.04e-3
"""What it takes then for a step, for each token that it sends and for each token of a prompt, in
seconds: what a server of the demo model took longer than the same model without one, on two cores
of Zen 3."""
NARROW = 192
"""To begin a dot product and to add up its sums takes as long as so many products more. The demo
model's experts, 128 wide, reach 28 billion products a second where those of MEASURED have 70."""
MEASURED = (2048, 768)
"""The hidden size and the width of the experts with which rates of products were measured."""
CALL = 20e-6
"""To wake the engine's threads, share a call and join, on 64 cores."""


def experts(
    model: ModelShape, machine: Machine, how: Placement, layer: LayerShape, tokens: int
) -> Seconds:
    """The routed experts of one layer, by the engine."""
    parts = how.expert_parts(model)
    bits = sum(part.share * max(part.bits, machine.least_bits(part.format)) for part in parts)
    reading = layer.read(tokens) * bits / 8 / _read(machine)
    rate = 1 / sum(part.share / machine.products(part.format) for part in parts)
    rate *= _width(model.hidden, layer.inner(model.hidden))
    if tokens * layer.chosen < 16 * layer.experts:
        rate *= FEW_TOKENS
    multiplying = layer.products(tokens) / rate
    return {_named("experts", reading, multiplying): max(reading, multiplying) + CALL}


def linear(model: ModelShape, machine: Machine, how: Placement, tokens: int, ends: int) -> Seconds:
    """Everything outside the experts but attention, by the engine's linear layers.

    `ends` of the tokens need the output layer: the last one of each sequence.
    """
    weights = sum(layer.others for layer in model.layers)
    reading = (weights + model.head) * how.other_bits(model) / 8 / _read(machine)
    rate = machine.products("int8" if how.int8_linear else "bf16")
    multiplying = (tokens * weights + ends * model.head) / rate
    return {_named("other weights", reading, multiplying): max(reading, multiplying)}


def attention(model: ModelShape, machine: Machine, tokens: int, ends: int, back: float) -> Seconds:
    """Attention of `tokens` tokens of `ends` sequences that look back at `back` others each."""
    values, products = model.attention(tokens, ends, back)
    reading = 2 * values / _read(machine)
    usable = min(1.0, ATTENTION_CORES / machine.cores)
    multiplying = products / (ATTENTION * usable * machine.products("bf16"))
    return {_named("attention", reading, multiplying): max(reading, multiplying)}


def steps(model: ModelShape, machine: Machine, tokens: int, ends: int) -> Seconds:
    """What vLLM takes for a pass beside its operators."""
    seconds = STEP + LAYER * len(model.layers)
    if machine.cores <= SHARED_CORES:
        seconds += FRONT_STEP + FRONT_TOKEN * ends + FRONT_PROMPT_TOKEN * (tokens - ends)
    return {"vLLM's own steps": seconds}


def _width(hidden: float, inner: float) -> float:
    """The share of the measured rate that narrower experts reach."""

    def slowness(hidden: float, inner: float) -> float:
        # w13, two thirds of the products, has rows of the hidden size, and w2 of the inner one.
        return (2 * (1 + NARROW / hidden) + 1 + NARROW / inner) / 3

    return min(1.0, slowness(*MEASURED) / slowness(hidden, inner))


def _read(machine: Machine) -> float:
    return READ * machine.read_gb_per_s * 1e9


def _named(part: str, reading: float, multiplying: float) -> str:
    return f"{part}: {'memory bandwidth' if reading >= multiplying else 'arithmetic'}"
