"""How long cards take for parts of a pass.

LvLLM has not run on a GPU yet: all constants here are estimates.
"""

from lvllm.planning.cpu_time import CALL, Seconds
from lvllm.planning.machine import Gpu, Machine
from lvllm.planning.placement import Placement
from lvllm.planning.shape import LayerShape, ModelShape

__all__ = ["attention", "beside_cache", "experts", "linear", "steps", "streamed"]

READ = 0.8
MULTIPLY = 0.5
"""The shares of the maker's numbers that kernels reach."""
STEP = 2e-3
LAYER = 30e-6
"""A step of vLLM, and a layer in a CUDA graph, in seconds."""
HANDOVER = 60e-6
"""To hand a layer's activations to the CPU and the result back."""
DIVIDE = 20e-6
"""To divide a layer's batch between the cache and the CPU, and to add both results: some ten
kernels in a graph, most of which run beside the CPU."""


def experts(model: ModelShape, machine: Machine, layer: LayerShape, tokens: int) -> Seconds:
    """The routed experts of one layer that stay on the cards."""
    return _part(
        "resident experts", machine, layer.read(tokens), layer.products(tokens), model.bits.experts
    )


def beside_cache(
    model: ModelShape,
    machine: Machine,
    how: Placement,
    layer: LayerShape,
    tokens: int,
    on_cpu: Seconds,
    saved: float,
) -> Seconds:
    """The routed experts of one layer, where a cache on the cards saves a share of the CPU's reads.

    The cards compute this share while the CPU computes the others. `on_cpu` is what it would take
    for all of them.
    """
    name, seconds = next(iter(on_cpu.items()))
    left = (1 - saved) * (seconds - CALL)
    bits = how.expert_bits(model)
    part = _part("cached experts", machine, layer.read(tokens), layer.products(tokens), bits)
    cached, whole = next(iter(part.items()))
    longer = {name: left} if left >= saved * whole else {cached: saved * whole}
    return {"handing over to the CPU": CALL + DIVIDE, **longer}


def streamed(
    model: ModelShape, machine: Machine, how: Placement, layer: LayerShape, tokens: int
) -> Seconds:
    """The routed experts of one layer that are copied to the cards while others are computed.

    Those that the cache holds are not copied. A batch that is streamed reads nearly all experts, so
    the cache holds no more of what it reads than its share.
    """
    card = _card(machine)
    # The cards of a tensor-parallel group copy a part each, together no faster than the host reads.
    bus = min(machine.gpus * card.bus_gb_per_s, machine.read_gb_per_s) * 1e9
    copied = 1 - how.cached_share(model, machine.gpus)
    copying = copied * layer.routed * how.expert_bits(model) / 8 / bus
    multiplying = layer.products(tokens) / _products(machine)
    limit = "bus" if copying >= multiplying else "the GPU's arithmetic"
    return {f"streamed experts: {limit}": max(copying, multiplying)}


def linear(model: ModelShape, machine: Machine, tokens: int, ends: int) -> Seconds:
    """Everything outside the experts but attention; as in cpu_time."""
    weights = sum(layer.others for layer in model.layers)
    products = tokens * weights + ends * model.head
    return _part("other weights", machine, weights + model.head, products, model.bits.others)


def attention(model: ModelShape, machine: Machine, tokens: int, ends: int, back: float) -> Seconds:
    """Attention; as in cpu_time."""
    values, products = model.attention(tokens, ends, back)
    return _part("attention", machine, values, products, 16)


def steps(model: ModelShape, on_cpu: int) -> Seconds:
    """What a pass takes even without tokens; `on_cpu` layers have experts on the CPU."""
    return {
        "vLLM's own steps": STEP + LAYER * len(model.layers),
        "handing over to the CPU": HANDOVER * on_cpu,
    }


def _part(name: str, machine: Machine, weights: float, products: float, bits: float) -> Seconds:
    card = _card(machine)
    reading = weights * bits / 8 / (machine.gpus * READ * card.read_gb_per_s * 1e9)
    multiplying = products / _products(machine)
    limit = "memory" if reading >= multiplying else "arithmetic"
    return {f"{name}: the GPU's {limit}": max(reading, multiplying)}


def _products(machine: Machine) -> float:
    """Products a second of all cards; each is two operations."""
    return machine.gpus * MULTIPLY * _card(machine).bf16_tflop_per_s * 1e12 / 2


def _card(machine: Machine) -> Gpu:
    if machine.gpu is None:
        raise ValueError("the machine has no GPU")
    return machine.gpu
