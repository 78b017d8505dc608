"""What the parts of a layer take, by the planner's formulas, on a GPU and on lk."""

from dataclasses import dataclass, field, replace
from functools import cached_property

from benchmarks.gpu_model.machines import Overheads
from lvllm.gpu.hybrid import PINNED_BYTES
from lvllm.planning import cpu_time, gpu_time
from lvllm.planning.cpu_time import Seconds
from lvllm.planning.machine import Machine
from lvllm.planning.placement import Placement
from lvllm.planning.shape import LayerShape, ModelShape
from lvllm.units import ceil_div

__all__ = ["Parts"]

BF16 = 2


@dataclass(frozen=True)
class Parts:
    """The parts of a model's layers on a machine, in seconds."""

    model: ModelShape
    machine: Machine
    overheads: Overheads = field(default_factory=Overheads)
    mailbox: bool = False
    """Whether LVLLM_GPU_CALL is mailbox; otherwise it is hostfunc."""

    @cached_property
    def bus(self) -> float:
        """Bytes a second to each card: its own bus, or its share of what the host reads."""
        assert self.machine.gpu, "all machines here have a GPU"
        shared = self.machine.read_gb_per_s / self.machine.gpus
        return 1e9 * min(self.machine.gpu.bus_gb_per_s, shared)

    def dense(self, layer: LayerShape, tokens: int, users: int, back: float) -> float:
        """Attention, router, shared experts and the like on the GPU, and its kernels' starts."""
        one = replace(self.model, layers=(layer,), head=0)
        return (
            _sum(gpu_time.linear(one, self.machine, tokens, users))
            + _sum(gpu_time.attention(one, self.machine, tokens, users, back))
            + self.overheads.layer
            + self._reduce(tokens)
        )

    def head(self, users: int) -> float:
        """The output layer for one token of each user."""
        return _sum(gpu_time.linear(replace(self.model, layers=()), self.machine, users, users))

    def products(self, layer: LayerShape, tokens: int) -> float:
        """The routed experts on the GPU: they are read from its memory, or multiply for longer."""
        return _sum(gpu_time.experts(self.model, self.machine, layer, tokens))

    def handed_over(self, tokens: int) -> float:
        """The activations go to lk and its results come back."""
        call = self.overheads.mailbox if self.mailbox else self.overheads.call
        moved = 2 * tokens * self.model.hidden * BF16 / self.bus
        return 2 * self.overheads.exchange + call + moved

    def lk(self, layer: LayerShape, tokens: int) -> float:
        """The routed experts on the CPUs, in as many parts as the pinned memory wants."""
        parts = ceil_div(2 * tokens * self.model.hidden * BF16, PINNED_BYTES)
        return parts * _sum(self._lk(layer, ceil_div(tokens, parts)))

    def lk_limit(self, layer: LayerShape, tokens: int) -> str:
        """What limits lk: host memory or CPU."""
        return "host memory" if "bandwidth" in next(iter(self._lk(layer, tokens))) else "CPU"

    def _lk(self, layer: LayerShape, tokens: int) -> Seconds:
        return cpu_time.experts(self.model, self.machine, Placement(True), layer, tokens)

    def _reduce(self, tokens: int) -> float:
        """Cards add up their parts of a layer, after attention and after the experts."""
        cards = self.machine.gpus
        if cards == 1:
            return 0.0
        moved = 2 * (cards - 1) / cards * tokens * self.model.hidden * BF16
        return 2 * (self.overheads.reduce + moved / self.bus)


def _sum(seconds: Seconds) -> float:
    return sum(seconds.values())
