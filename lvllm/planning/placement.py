"""What lies where: on the cards, in the host's memory, and on each NUMA node."""

from dataclasses import dataclass
from typing import Literal

from lvllm.planning import rounding, slots
from lvllm.planning.bits import FormatShare
from lvllm.planning.machine import Machine
from lvllm.planning.shape import LayerShape, ModelShape
from lvllm.settings.use_weight import UseWeight
from lvllm.units import GIB, gib

__all__ = ["Load", "Memory", "Placement", "memory", "offloaded_layers", "resident_layers"]

USABLE = 0.9
"""Of a card's memory, vLLM takes this share by default (gpu-memory-utilization)."""
CARD_OVERHEAD = 1.5 * GIB
"""What PyTorch, CUDA and the graphs take of a card; an estimate."""
HOST_OVERHEAD = 3 * GIB
"""What a rank's interpreter and buffers take. About 1 GiB of it was measured without a GPU; the
rest leaves room for the page cache while loading."""
STAGED = 2
"""Layers, or at least experts, that are staged: gpu_prefetch_window is 1, so one is copied while
one is computed."""
STAGING_BYTES = GIB
"""The default of LVLLM_GPU_STAGING_MIB, the most memory for more than two experts on each card."""


@dataclass(frozen=True)
class Load:
    """What is asked of the server."""

    prompt: int = 2048
    """Tokens of a prompt."""
    answer: int = 256
    users: int = 1
    context: int = 8192
    """The longest context, in tokens, that each user may have."""
    batch: int = 2048
    """Tokens of a prompt that are computed at once."""
    kv_cache: float = 0
    """Bytes that the KV cache of each card has at least, whatever the contexts take."""


@dataclass(frozen=True)
class Placement:
    """A way to run a model."""

    on_gpu: bool
    """Whether everything but the offloaded experts is on the cards."""
    resident: int = 0
    """How many layers keep their experts on the cards."""
    streamed_from: int | None = None
    """Batches of at least so many tokens have experts copied to the cards; None: no batch has."""
    use_weight: UseWeight = UseWeight.KEEP
    """LVLLM_MOE_USE_WEIGHT: KEEP, or a format to which experts are rounded while loading."""
    int8_linear: bool = False
    """LVLLM_DENSE_WEIGHT=INT8, without a GPU."""
    cache: float = 0
    """Bytes of each card for the experts that are read most, of all layers that are not resident.
    The host holds these experts, too."""

    def expert_bits(self, model: ModelShape) -> float:
        return rounding.bits(model, self.use_weight)

    def expert_parts(self, model: ModelShape) -> tuple[FormatShare, ...]:
        """The formats that the engine computes."""
        if model.bits.parts and not rounding.is_rounded(model, self.use_weight):
            return model.bits.parts
        return (FormatShare(rounding.format(model, self.use_weight), 1, self.expert_bits(model)),)

    def cached_experts(self, model: ModelShape, cards: int) -> int:
        """How many experts the cache holds."""
        layers = offloaded_layers(model, self.resident)
        return slots.count(layers, self.expert_bits(model), cards, self.cache)

    def cached_share(self, model: ModelShape, cards: int) -> float:
        """The share of the experts of all layers that are not resident which the cache holds."""
        if not self.cache or not (layers := offloaded_layers(model, self.resident)):
            return 0
        return self.cached_experts(model, cards) / sum(layer.experts for layer in layers)

    def other_bits(self, model: ModelShape) -> float:
        """On a CPU, weights outside the experts are computed in 16 bits, or in 8 if asked for."""
        if self.on_gpu:
            return model.bits.others
        return 8 if self.int8_linear else 16


Part = Literal[
    "experts",
    "cached experts",
    "other weights",
    "KV cache",
    "staging",
    "activations",
    "programs",
]


@dataclass(frozen=True)
class Memory:
    """Bytes by part, on each card, on the host, and on the fullest NUMA node."""

    card: dict[Part, float]
    """Empty without a GPU."""
    host: dict[Part, float]
    node: dict[Part, float]
    card_lacks: str | None
    """One line that says what does not fit; None if everything does."""
    host_lacks: str | None

    @property
    def lacks(self) -> str | None:
        return self.card_lacks or self.host_lacks


def resident_layers(model: ModelShape, count: int) -> tuple[LayerShape, ...]:
    """The layers that keep their experts on the cards, if `count` do: the first ones."""
    return model.moe_layers[:count]


def offloaded_layers(model: ModelShape, resident: int) -> tuple[LayerShape, ...]:
    """The layers whose experts are on the host, if so many are resident."""
    return model.moe_layers[resident:]


def memory(model: ModelShape, machine: Machine, how: Placement, load: Load) -> Memory:
    """Where the bytes of `how` lie, and whether they fit."""
    expert = how.expert_bits(model) / 8
    routed = model.routed * expert
    others = model.others * how.other_bits(model) / 8
    cache = float(load.users * model.cache_bytes(load.context))
    activations = _activations(model, load)
    if not how.on_gpu:
        host: dict[Part, float] = {
            "experts": routed,
            "other weights": others,
            "KV cache": cache,
            "activations": activations,
            "programs": HOST_OVERHEAD,
        }
        return _checked(machine, {}, host)
    kept = resident_layers(model, how.resident)
    # A layer that stays on the cards is in the checkpoint's own format.
    resident = sum(layer.routed for layer in kept) * model.bits.experts / 8
    offloaded = routed - sum(layer.routed for layer in kept) * expert
    cards = machine.gpus
    two = STAGED * max(layer.expert for layer in model.moe_layers) * expert / cards
    staged = STAGED * max(layer.routed for layer in model.moe_layers) * expert / cards
    staging = min(staged, max(two, STAGING_BYTES))
    card: dict[Part, float] = {
        "experts": resident / cards,
        "cached experts": _cached(model, how, load, cards),
        "other weights": others / cards,
        "KV cache": max(cache / cards, load.kv_cache),
        "staging": staging if how.streamed_from is not None and offloaded else 0,
        "activations": activations,
        "programs": CARD_OVERHEAD,
    }
    return _checked(machine, card, {"experts": offloaded, "programs": HOST_OVERHEAD * cards})


def _cached(model: ModelShape, how: Placement, load: Load, cards: int) -> float:
    """What the cache of experts takes of each card."""
    held = how.cached_experts(model, cards)
    if not held:
        return 0
    layers = offloaded_layers(model, how.resident)
    each = slots.expert_bytes(layers, how.expert_bits(model), cards)
    return held * each + slots.beside_slots(model, layers, load.batch)


def _activations(model: ModelShape, load: Load) -> float:
    """Bytes of a pass's activations: some tensors of 16 bits as wide as the widest projection."""
    widest = max(layer.others // model.hidden for layer in model.layers)
    return 2.0 * load.batch * min(4 * model.hidden + widest, 16 * model.hidden)


def _checked(machine: Machine, card: dict[Part, float], host: dict[Part, float]) -> Memory:
    # The engine puts an equal share of each expert's rows on each node. All else may be on one.
    node = {
        part: size / machine.nodes if part == "experts" else size for part, size in host.items()
    }
    card_lacks = host_lacks = None
    if card and machine.gpu and sum(card.values()) > USABLE * machine.gpu.memory_bytes:
        card_lacks = (
            f"each GPU would hold {gib(sum(card.values()))},"
            f" and {gib(USABLE * machine.gpu.memory_bytes)} are usable"
        )
        if size := card["cached experts"]:
            card_lacks += f"; {gib(size)} are for the cache of experts"
    if sum(host.values()) > machine.memory_bytes:
        host_lacks = (
            f"the host would hold {gib(sum(host.values()))}, and has {gib(machine.memory_bytes)}"
        )
    return Memory(card, host, node, card_lacks, host_lacks)
