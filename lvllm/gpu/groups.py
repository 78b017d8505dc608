"""Groups of consecutive experts of a layer, which are copied to the device together."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch

from lvllm.gpu import packing

__all__ = ["GROUP_BYTES", "LayerGroups", "LayerWeights"]

LayerWeights: TypeAlias = Mapping[str, torch.Tensor]
"""The host tensors of one layer, by ExpertLayer's argument names. Each has an entry an expert."""

GROUP_BYTES = 16 << 20
"""The most bytes of a group of several experts. A bus of 55 GB/s takes 0.3 ms for them, and other
copies to the device wait no longer than that. The host queues a group's copies in some 20 us."""


class LayerGroups:
    """How the experts of a layer are divided into groups, and where their tensors lie in one.

    Raises ValueError for a tensor that is not contiguous, not on the CPU, or of another number of
    experts than the first.
    """

    def __init__(self, number: int, weights: LayerWeights) -> None:
        self.number, self.weights = number, weights
        self.experts = len(next(iter(weights.values())))
        for name, tensor in weights.items():
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                raise ValueError(
                    f"layer {number}: {name} is on {tensor.device} with strides {tensor.stride()},"
                    " wanted a contiguous tensor on the CPU"
                )
            if len(tensor) != self.experts:
                raise ValueError(
                    f"layer {number}: {name} has {len(tensor)} experts, wanted {self.experts}"
                )
        # This is asked for with each copy, and to index a tensor takes PyTorch microseconds.
        self._signature = packing.signature(weights)
        self.most = min(max(1, GROUP_BYTES // self.size(1)), self.experts)
        """The most experts of a group."""

    def size(self, experts: int) -> int:
        """Return the bytes of a group of so many experts."""
        return packing.packed_bytes(self._signature, experts)

    def divide(self, some: range, counts: Sequence[int] | None = None) -> Iterator[range]:
        """Yield groups of those of `some` experts that have tokens, by `counts`; None: all."""
        begin = some.start
        while begin < some.stop:
            end, last = begin, min(begin + self.most, some.stop)
            while end < last and (counts is None or counts[end]):
                end += 1
            if end > begin:
                yield range(begin, end)
            begin = max(end, begin + 1)

    def sources(self, some: range) -> dict[str, torch.Tensor]:
        """Return these experts' tensors on the host."""
        return {name: tensor[some.start : some.stop] for name, tensor in self.weights.items()}

    def views(self, some: range, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors of a group of these experts in uint8 [size(len(some))]."""
        return packing.views(self._signature, len(some), memory)
