"""An accelerator in virtual time: its streams are clocks, and nothing is computed or copied.

Every piece of work gets its begin and its end when it is queued. That is possible since a wait
refers to a record that was made before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch

from lvllm.gpu.accelerator import Accelerator, check_copy, check_pinnable

__all__ = ["QUEUE", "SimulatedAccelerator", "SimulatedEvent", "SimulatedStream"]

QUEUE = 2.7e-6
"""The host's seconds to queue a piece of work: 2.62 to 2.81 us were measured for a kernel on an RTX
5070 Ti (https://github.com/ahrefs/ocannl/issues/488)."""


@dataclass
class SimulatedStream:
    """A queue of work."""

    clock: float = 0.0
    """The seconds at which all of its work is done."""
    busy: float = 0.0
    """The seconds of its work, without those in which it waited."""


@dataclass
class SimulatedEvent:
    """An event, and the seconds at which its last record is reached; None: it has none."""

    at: float | None = None


@dataclass
class SimulatedAccelerator(Accelerator):
    """A device with one engine for copies in each direction, which serve copies as they are queued.

    Tensors on the device are on PyTorch's meta device, so models of any size take no memory.
    """

    bus: float
    """Bytes a second that a copy between host and device takes."""
    queue: float = QUEUE
    now: float = 0.0
    """The host's clock: no work begins before it was queued."""
    to_device: SimulatedStream = field(default_factory=SimulatedStream)
    to_host: SimulatedStream = field(default_factory=SimulatedStream)
    _compute: SimulatedStream = field(default_factory=SimulatedStream)

    name = "simulated"
    device = torch.device("meta")

    def launch(self, seconds: float, stream: SimulatedStream) -> None:
        """Queue work that takes so many seconds. It takes the place of kernels."""
        self._put(seconds, stream)

    def compute(self) -> SimulatedStream:
        return self._compute

    def stream(self) -> SimulatedStream:
        return SimulatedStream()

    def within(self, stream: SimulatedStream) -> NoReturn:
        raise NotImplementedError("nothing is computed here")

    def event(self) -> SimulatedEvent:
        return SimulatedEvent()

    def record(self, event: SimulatedEvent, stream: SimulatedStream) -> None:
        self.now += self.queue
        event.at = self.mark(stream)

    def wait(self, event: SimulatedEvent, stream: SimulatedStream) -> None:
        self.now += self.queue
        if event.at is not None:
            stream.clock = max(stream.clock, event.at)

    def reached(self, event: SimulatedEvent) -> bool:
        return event.at is None or event.at <= self.now

    def mark(self, stream: SimulatedStream) -> float:
        return max(stream.clock, self.now)

    def seconds(self, first: float, second: float) -> float | None:
        return second - first if max(first, second) <= self.now else None

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: SimulatedStream) -> None:
        check_copy(target, source)
        engine = self.to_device if target.device == self.device else self.to_host
        stream.clock = max(stream.clock, engine.clock)
        seconds = source.nbytes / self.bus
        self._put(seconds, stream)
        engine.clock = stream.clock
        engine.busy += seconds

    def exchange(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: SimulatedStream
    ) -> None:
        for target, source in pairs:
            check_copy(target, source)
        self._put(sum(source.nbytes for _, source in pairs) / self.bus, stream)

    def synchronize(self, stream: SimulatedStream) -> None:
        self.now = self.mark(stream)

    def device_memory(self, size: int, stream: SimulatedStream) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def pin(self, tensor: torch.Tensor) -> None:
        check_pinnable(tensor)

    def unpin(self, tensor: torch.Tensor) -> None:
        pass

    def capturing(self) -> bool:
        return False

    def call(self, function: int, argument: int, stream: SimulatedStream) -> NoReturn:
        raise NotImplementedError("the host's work is simulated by `launch`")

    def write_word(self, address: int, value: int, stream: SimulatedStream) -> NoReturn:
        raise NotImplementedError("the host's work is simulated by `launch`")

    def await_word(self, address: int, value: int, stream: SimulatedStream) -> NoReturn:
        raise NotImplementedError("the host's work is simulated by `launch`")

    def _put(self, seconds: float, stream: SimulatedStream) -> None:
        self.now += self.queue
        stream.clock = self.mark(stream) + seconds
        stream.busy += seconds
