"""Compares the ways to run a model on a machine, and takes the fastest that fits."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lvllm.planning import hits
from lvllm.planning.filling import NOTHING, Given, filled
from lvllm.planning.machine import Machine
from lvllm.planning.placement import Load, Memory, Placement, memory, offloaded_layers
from lvllm.planning.shape import ModelShape
from lvllm.planning.speed import Speed, predict
from lvllm.settings.use_weight import UseWeight

__all__ = ["BATCHES", "THRESHOLDS", "Cache", "Candidate", "Plan", "cache_of", "choose"]

THRESHOLDS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Tokens from which a batch may be streamed to the cards."""
BATCHES = (2048, 4096, 8192, 16384, 32768)
"""Tokens of a prompt that may be computed at once. A streamed layer is copied once a batch."""
ON_GPU = "everything on the GPU"
STREAMED = "long prompts streamed"
NAMES = {None: "experts on the CPU", 1: "every batch streamed"}
"""What candidates are called, by the least batch that is streamed."""
CACHED = "most used experts cached"
CACHED_AND_STREAMED = "streamed and cached"


@dataclass(frozen=True)
class Candidate:
    """A way to run a model, with what it needs and how fast it is."""

    name: str
    how: Placement
    load: Load
    memory: Memory
    speed: Speed

    @property
    def seconds(self) -> float:
        """What the load takes."""
        return self.speed.seconds(self.load)

    @property
    def order(self) -> tuple[bool, float]:
        """What fits comes first, and then what is faster."""
        return self.memory.lacks is not None, self.seconds


@dataclass(frozen=True)
class Plan:
    """The candidates, the fastest first; those that do not fit come last."""

    model: ModelShape
    machine: Machine
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate | None:
        """The fastest candidate that fits; None if nothing fits."""
        first = self.candidates[0]
        return None if first.memory.lacks else first


@dataclass(frozen=True)
class Cache:
    """A candidate's cache of experts on the cards."""

    bytes_per_gpu: float
    experts: int
    """How many it holds."""
    of: int
    """How many the layers have that are not resident."""
    saved: float
    """The share of the reads of a decoding step that it is taken to save."""


def cache_of(plan: Plan, one: Candidate) -> Cache | None:
    """The cache of experts of a candidate; None if it has none."""
    cards, how = plan.model.cards(plan.machine.gpus), one.how
    layers = offloaded_layers(plan.model, how.resident)
    if not (held := how.cached_experts(plan.model, cards)):
        return None
    share = how.cached_share(plan.model, cards)
    reads = [layer.read(one.load.users) for layer in layers]
    saved = [hits.saved_reads(layer, one.load.users, share) for layer in layers]
    total = sum(read * part for read, part in zip(reads, saved, strict=True)) / sum(reads)
    return Cache(how.cache, held, sum(layer.experts for layer in layers), total)


def choose(
    model: ModelShape,
    machine: Machine,
    load: Load,
    *,
    experts: Sequence[UseWeight] = (UseWeight.KEEP,),
    int8_linear: bool = False,
    batches: tuple[int, ...] = BATCHES,
    given: Given = NOTHING,
) -> Plan:
    """All candidates for a load, compared by the time that its prompts and answers take.

    Args:
        experts: the values of LVLLM_MOE_USE_WEIGHT to compare.
        int8_linear: whether linear layers may be rounded to 8 bits, without a GPU.
        batches: how many tokens of a prompt may be computed at once beside a GPU.
        given: what the user has decided already.
    """

    used = machine.model_copy(update={"gpus": model.cards(machine.gpus)} if machine.gpus else {})

    def candidate(name: str, how: Placement, load: Load = load) -> Candidate:
        needs = memory(model, used, how, load)
        return Candidate(name, how, load, needs, predict(model, used, how, load))

    ways: dict[str, list[Candidate]] = defaultdict(list)
    for use in experts:
        how = Placement(False, use_weight=use, int8_linear=int8_linear)
        ways["everything on the CPU"].append(candidate("everything on the CPU", how))
        for size in batches if used.gpu and used.gpus else ():
            one = replace(load, batch=size)
            for tokens in _least_batches(given, size):
                streamed = Placement(True, streamed_from=tokens, use_weight=use)
                for how in filled(model, used, streamed, one, given):
                    name = _name(model, how)
                    ways[name].append(candidate(name, how, one))
    found = [min(some, key=lambda one: one.order) for some in ways.values()]
    if given.cache is None and any(one.name == ON_GPU and not one.memory.lacks for one in found):
        # With other batches not all layers may fit. These have no need of a cache.
        found = [one for one in found if not one.how.cache]
    return Plan(model, machine, tuple(sorted(found, key=lambda one: one.order)))


def _least_batches(given: Given, most: int) -> tuple[int | None, ...]:
    """From how many tokens on batches may be streamed, if the largest has `most`."""
    found = given.streamed or (None, 1, *THRESHOLDS)
    # A threshold that no batch reaches is the user's own.
    return tuple(tokens for tokens in found if tokens is None or tokens <= most) or found


def _name(model: ModelShape, how: Placement) -> str:
    if how.resident == len(model.moe_layers):
        return ON_GPU
    if how.cache:
        return CACHED if how.streamed_from is None else CACHED_AND_STREAMED
    return NAMES.get(how.streamed_from, STREAMED)
