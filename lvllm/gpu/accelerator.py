"""What GPU offload needs of a GPU: streams, events, copies, callbacks on the host, pinned memory.

There are two: CUDA, and a stand-in on the host whose streams are threads, for tests. The rules are
CUDA's. What is put in a stream is done later, in the stream's order; streams go on side by side
unless one waits for an event of the other. Events are recorded again and again, and a wait means
the last record that was made before the call.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

__all__ = ["Accelerator", "Event", "Stream", "check_copy", "check_pinnable", "open_accelerator"]

Stream: TypeAlias = Any
"""Opaque."""
Event: TypeAlias = Any
"""Opaque."""


class Accelerator(ABC):
    """A device and its streams, for one process.

    An error of the device is a RuntimeError of the call that meets it, which need not be the one
    that caused it.
    """

    name: str
    device: torch.device
    """Where activations and staged weights are."""

    @abstractmethod
    def compute(self) -> Stream:
        """The stream in which the caller's tensor operations run now."""

    @abstractmethod
    def stream(self) -> Stream:
        """A new stream."""

    @abstractmethod
    def event(self) -> Event:
        """A new event, not recorded yet."""

    @abstractmethod
    def record(self, event: Event, stream: Stream) -> None:
        """The event comes after all that is in `stream` by now."""

    @abstractmethod
    def wait(self, event: Event, stream: Stream) -> None:
        """What is put in `stream` from now on comes after the event's last record.

        An event that was never recorded is not waited for.
        """

    @abstractmethod
    def reached(self, event: Event) -> bool:
        """Whether the event's last record has come, without waiting. Not while capturing."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Copy, in stream order. Both tensors live until it is done; the host's are pinned.

        Raises ValueError unless they are contiguous and of one shape and dtype.
        """

    @abstractmethod
    def call(self, function: int, argument: int, stream: Stream) -> None:
        """Call the C function void(void*) at this address, in stream order, on some host thread.

        It must call neither CUDA nor Python. In a graph, each replay calls it.
        """

    @abstractmethod
    def synchronize(self, stream: Stream) -> None:
        """The caller waits for all that is in `stream`."""

    @abstractmethod
    def device_memory(self, size: int, stream: Stream) -> torch.Tensor:
        """uint8 [size] on the device, for the caller's stream and for `stream`.

        Its old contents may still be in use: before `stream` writes it for the first time, it has
        to wait for an event recorded in the caller's stream after this call. Once the tensor is
        dropped, its memory goes to nobody else before what is in `stream` by then is done.

        Raises MemoryError with what was asked for and what is free.
        """

    @abstractmethod
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """New host memory that the device copies from and to by itself."""

    @abstractmethod
    def pin(self, tensor: torch.Tensor) -> None:
        """Make existing host memory such memory, be it read-only. It is kept until `unpin`.

        Raises ValueError unless the tensor is contiguous and on the CPU, and RuntimeError, in one
        line, if the system refuses.
        """

    @abstractmethod
    def unpin(self, tensor: torch.Tensor) -> None:
        """Undo `pin`, once what is queued is done. ValueError if the tensor is not pinned."""

    @abstractmethod
    def capturing(self) -> bool:
        """Whether what is put in the caller's stream now becomes part of a graph."""


def open_accelerator(name: str) -> Accelerator:
    """The accelerator called `name`: cuda or host.

    Raises ValueError for another name, and RuntimeError, in one line, where there is no such
    device.
    """
    if name == "cuda":
        from lvllm.gpu.cuda import CudaAccelerator

        return CudaAccelerator()
    if name == "host":
        from lvllm.gpu.stand_in import StandInAccelerator

        return StandInAccelerator()
    raise ValueError(f"accelerator is {name!r}, must be one of cuda, host")


def check_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Raises ValueError unless one is a plain copy of the other's bytes."""
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


def check_pinnable(tensor: torch.Tensor) -> None:
    """Raises ValueError unless it is one piece of host memory."""
    if tensor.device.type != "cpu":
        raise ValueError(f"cannot pin a tensor on {tensor.device}, wanted the CPU")
    if not tensor.is_contiguous():
        raise ValueError(
            f"cannot pin a tensor with strides {tensor.stride()}, wanted a contiguous one"
        )
