"""A shared batch: the GPU fetches some experts of a layer while lk computes the others.

Both end together if the GPU takes the share cpu / (cpu + gpu) of the
experts, where cpu and gpu are the seconds that each would take for all of them.
"""

from dataclasses import dataclass

from benchmarks.gpu_model.layers import Parts
from benchmarks.gpu_model.prefill import Prefill

__all__ = ["Shared", "shared"]


@dataclass(frozen=True)
class Shared:
    """A batch, with seconds of one layer's experts and of the whole prompt."""

    tokens: int
    cpu: float
    gpu: float
    """Each alone; `gpu` has the copy."""
    both: float
    prompt: float
    """With whole batches on the faster one."""
    shared_prompt: float

    @property
    def share(self) -> float:
        """The GPU's share of the experts."""
        return self.cpu / (self.cpu + self.gpu)

    @property
    def gain(self) -> float:
        """How many times as fast a layer's experts are as on the faster one alone."""
        return min(self.cpu, self.gpu) / self.both

    @property
    def prompt_gain(self) -> float:
        """How many times as fast the whole prompt is; 1 if it is better not shared."""
        return max(1.0, self.prompt / self.shared_prompt)


def shared(prefill: Prefill, parts: Parts, tokens: int) -> Shared:
    """Share a prompt of one batch. Nothing is copied ahead for it."""
    layer = parts.model.moe_layers[0]
    point = prefill.point(layer, tokens)
    together = point.cpu * point.streamed / (point.cpu + point.streamed)
    # Both read host memory, and neither ends before that is read.
    read = layer.read(tokens) * parts.model.bits.experts / 8 / (parts.machine.read_gb_per_s * 1e9)
    both = min(point.cpu, point.streamed, max(together, read))
    rest = sum(parts.dense(one, tokens, 1, tokens / 2) for one in parts.model.layers)
    whole = rest + len(parts.model.moe_layers) * both + parts.head(1) + parts.overheads.step
    alone = prefill.prompt(tokens).seconds
    return Shared(tokens, point.cpu, point.streamed, both, alone, whole)
