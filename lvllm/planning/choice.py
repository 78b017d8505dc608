"""Compares the ways to run a model on a machine, and takes the fastest that fits."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lvllm.planning.machine import Machine
from lvllm.planning.placement import Load, Memory, Placement, memory
from lvllm.planning.shape import ModelShape
from lvllm.planning.speed import Speed, predict
from lvllm.settings.use_weight import UseWeight

__all__ = ["Candidate", "Plan", "choose"]

THRESHOLDS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Tokens from which a batch may be streamed to the cards."""
BATCHES = (2048, 4096, 8192, 16384, 32768)
"""Tokens of a prompt that may be computed at once. A streamed layer is copied once a batch."""
ON_GPU = "everything on the GPU"
NAMES = {None: "experts on the CPU", 1: "every batch streamed"}
"""What candidates are called, by the least batch that is streamed."""


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


def choose(
    model: ModelShape,
    machine: Machine,
    load: Load,
    *,
    experts: Sequence[UseWeight] = (UseWeight.KEEP,),
    int8_linear: bool = False,
    batches: tuple[int, ...] = BATCHES,
) -> Plan:
    """All candidates for a load, compared by the time that its prompts and answers take.

    Args:
        experts: the values of LVLLM_MOE_USE_WEIGHT to compare.
        int8_linear: whether linear layers may be rounded to 8 bits, without a GPU.
        batches: how many tokens of a prompt may be computed at once beside a GPU.
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
            for tokens in (None, 1, *(n for n in THRESHOLDS if n <= size)):
                how = Placement(True, streamed_from=tokens, use_weight=use)
                if tokens != 1:
                    how = _filled(model, used, how, one)
                whole = how.resident == len(model.moe_layers)
                name = ON_GPU if whole else NAMES.get(tokens, "long prompts streamed")
                ways[name].append(candidate(name, how, one))
    found = [min(some, key=lambda one: one.order) for some in ways.values()]
    return Plan(model, machine, tuple(sorted(found, key=lambda one: one.order)))


def _filled(model: ModelShape, machine: Machine, how: Placement, load: Load) -> Placement:
    """With as many layers' experts on the cards as fit beside all else."""
    least, most = 0, len(model.moe_layers)
    while least < most:
        middle = (least + most + 1) // 2
        more = replace(how, resident=middle)
        if memory(model, machine, more, load).card_lacks:
            most = middle - 1
        else:
            least = middle
    return replace(how, resident=least)
