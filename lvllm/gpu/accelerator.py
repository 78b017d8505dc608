"""What GPU offload needs of a GPU: streams, events, copies, host callbacks and pinned memory.

There are two implementations: CUDA, and a stand-in for tests whose streams are threads of the host.
Both follow CUDA's rules. Work that is put in a stream is done later, in the stream's order. Streams
run side by side unless one waits for an event of the other. An event may be recorded many times,
and a wait refers to the last record that was made before the wait was queued.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch

__all__ = ["Accelerator", "Event", "Mark", "Stream", "check_copy", "check_pinnable"]

Stream: TypeAlias = Any
"""A stream of one accelerator. Callers only pass it on."""
Event: TypeAlias = Any
"""An event of one accelerator. Callers only pass it on."""
Mark: TypeAlias = Any
"""A place in a stream of one accelerator. Callers only pass it on."""


class Accelerator(ABC):
    """A device and its streams, for one process.

    An error of the device is raised as a RuntimeError by the call that meets it, which need not be
    the call that caused it.
    """

    name: str
    device: torch.device
    """Activations and staged weights are on this device."""
    compiles: bool
    """Whether kernels are compiled at their first launch."""

    @abstractmethod
    def compute(self) -> Stream:
        """Return the stream in which the caller's tensor operations run now."""

    @abstractmethod
    def stream(self) -> Stream:
        """Return a new stream."""

    @abstractmethod
    def within(self, stream: Stream) -> AbstractContextManager[object]:
        """Put the caller's tensor operations in this stream while the context is open."""

    @abstractmethod
    def event(self) -> Event:
        """Return a new event that has not been recorded yet."""

    @abstractmethod
    def record(self, event: Event, stream: Stream) -> None:
        """Place the event behind all work that is in `stream` by now."""

    @abstractmethod
    def wait(self, event: Event, stream: Stream) -> None:
        """Make all work that is put in `stream` from now on wait for the event's last record.

        An event that was never recorded is not waited for.
        """

    @abstractmethod
    def reached(self, event: Event) -> bool:
        """Tell whether the event's last record was reached, without waiting.

        This must not be called while a graph is captured.
        """

    @abstractmethod
    def mark(self, stream: Stream) -> Mark:
        """Note the time at which all work that is in `stream` by now is done.

        This must not be called while a graph is captured.
        """

    @abstractmethod
    def seconds(self, first: Mark, second: Mark) -> float | None:
        """Return the seconds from one mark to another, or None while one is not reached.

        The marks may be in different streams. The result is negative if the second came first. This
        does not wait, and must not be called while a graph is captured.
        """

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Copy a tensor in stream order.

        Both tensors must live until the copy is done, and the one on the host must be pinned.

        Raises ValueError unless both are contiguous and have the same shape and dtype, and for a
        target that was made in inference mode outside of that mode.
        """

    @abstractmethod
    def call(self, function: int, argument: int, stream: Stream) -> None:
        """Call the C function void(void*) at this address, in stream order, on some host thread.

        The function must call neither CUDA nor Python. If the call is captured in a graph, each
        replay calls the function.
        """

    @abstractmethod
    def write_word(self, address: int, value: int, stream: Stream) -> None:
        """Write 64 bits of pinned memory in stream order, after all that is in the stream.

        It may be captured in a graph, as `await_word` may: each replay writes the value.

        Raises RuntimeError if the device cannot do it.
        """

    @abstractmethod
    def await_word(self, address: int, value: int, stream: Stream) -> None:
        """Make all work that is put in `stream` from now on wait until these 64 bits are `value`.

        Raises RuntimeError if the device cannot do it.
        """

    @abstractmethod
    def exchange(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: Stream) -> None:
        """Copy up to three small tensors from or to pinned memory, each to the first of its pair.

        A kernel does it, and so it does not queue behind other copies in the same direction.

        Raises ValueError as `copy` does.
        """

    @abstractmethod
    def synchronize(self, stream: Stream) -> None:
        """Make the caller wait for all work in `stream`."""

    @abstractmethod
    def device_memory(self, size: int, stream: Stream) -> torch.Tensor:
        """Allocate uint8 [size] on the device, for use in the caller's stream and in `stream`.

        The memory's old contents may still be in use: `memory_for` makes `stream` wait for that.
        When the tensor is dropped, its memory is not reused before all work that is in `stream` by
        then is done.

        Raises MemoryError that says how much was asked for and how much is free.
        """

    def memory_for(self, size: int, stream: Stream) -> torch.Tensor:
        """Allocate uint8 [size] on the device that `stream` may write from now on.

        Raises MemoryError as `device_memory` does.
        """
        memory = self.device_memory(size, stream)
        # Work that used this memory before may still be in the compute stream.
        free = self.event()
        self.record(free, self.compute())
        self.wait(free, stream)
        return memory

    @abstractmethod
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Allocate host memory that the device can copy from and to without the CPU."""

    @abstractmethod
    def pin(self, tensor: torch.Tensor) -> None:
        """Pin memory that exists already. It may be read-only. It is kept until `unpin`.

        Raises ValueError unless the tensor is contiguous and on the CPU, and RuntimeError, in one
        line, if the system refuses.
        """

    @abstractmethod
    def unpin(self, tensor: torch.Tensor) -> None:
        """Undo `pin` once all queued work is done.

        Raises ValueError if the tensor is not pinned.
        """

    @abstractmethod
    def capturing(self) -> bool:
        """Tell whether work in the caller's stream is being captured in a graph now."""


def check_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Raise ValueError unless the copy is a plain copy of bytes that PyTorch allows.

    PyTorch refuses to change a tensor of inference mode outside of it, and vLLM runs steps in this
    mode, but not what comes between them.
    """
    if target.shape != source.shape or target.dtype != source.dtype:
        raise ValueError(
            f"cannot copy {source.dtype} {list(source.shape)} to {target.dtype}"
            f" {list(target.shape)}"
        )
    for name, tensor in (("target", target), ("source", source)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} of a copy has strides {tensor.stride()}, wanted a contiguous tensor"
            )
    if target.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("target of a copy was made in inference mode, and is changed outside")


def check_pinnable(tensor: torch.Tensor) -> None:
    """Raise ValueError unless the tensor is one piece of host memory."""
    if tensor.device.type != "cpu":
        raise ValueError(f"cannot pin a tensor on {tensor.device}, wanted the CPU")
    if not tensor.is_contiguous():
        raise ValueError(
            f"cannot pin a tensor with strides {tensor.stride()}, wanted a contiguous one"
        )
