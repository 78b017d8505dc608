"""Stand-ins for tests of the waits between streams."""

import random
import threading
from collections.abc import Callable

import torch

from lvllm.gpu.stand_in import StandInAccelerator, StandInStream


class Recorded(StandInAccelerator):
    """A stand-in that notes which host tensors are copied, and how much memory is allocated."""

    def __init__(self, delay: Callable[[], float] | None = None) -> None:
        super().__init__(delay)
        self.sources: list[torch.Tensor] = []
        self.allocated = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: StandInStream) -> None:
        self.sources.append(source)
        super().copy(target, source, stream)

    def device_memory(self, size: int, stream: StandInStream) -> torch.Tensor:
        self.allocated += size
        return super().device_memory(size, stream).fill_(0xEE)


class RecordedAhead(Recorded):
    """A stand-in whose caller runs ahead, as on a GPU: a thread does the caller's computations."""

    def __init__(self, delay: Callable[[], float] | None = None) -> None:
        super().__init__(delay)
        self._computing = self.stream()

    def compute(self) -> StandInStream:
        return self._computing


def uneven(seed: int, longest: tuple[float, float]) -> Callable[[], float]:
    """Make random delays. `longest` is in seconds, for the first stream and for all others."""
    draw = random.Random(seed)

    def delay() -> float:
        most = longest[not threading.current_thread().name.endswith("-0")]
        return draw.random() * most if most and draw.random() < 0.5 else 0.0

    return delay
