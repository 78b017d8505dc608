"""The device's memory for experts of any layer: a tensor for each of an expert's tensors."""

from collections.abc import Mapping
from typing import TypeAlias

import torch

from lvllm.gpu.accelerator import Accelerator, Stream
from lvllm.units import amount, ceil_div

__all__ = ["Signature", "Slots", "expert_bytes", "signature"]

Signature: TypeAlias = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
"""Name, dtype and shape of an expert's tensors. Experts of one signature fit in the same slots."""

ALIGNMENT = 256
"""The alignment of each tensor in bytes, which is that of CUDA's own allocations."""


def signature(tensors: Mapping[str, torch.Tensor]) -> Signature:
    """Return the signature of a layer's experts. Each tensor has an entry an expert."""
    return tuple((name, of.dtype, tuple(of.shape[1:])) for name, of in tensors.items())


def expert_bytes(of: Signature) -> int:
    """Return the bytes of an expert."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in of)


class Slots:
    """Room for `count` experts of one signature.

    `tensors` has, by name, a tensor [count, ...] on the device. Its contents are anything until
    `stream`, which alone may write it, has copied an expert there.

    Raises MemoryError, with the numbers, if the device has too little memory.
    """

    def __init__(self, accelerator: Accelerator, of: Signature, count: int, stream: Stream) -> None:
        sizes = [count * dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in of]
        begins, end = [], 0
        for size in sizes:
            begins.append(end)
            end += ceil_div(size, ALIGNMENT) * ALIGNMENT
        try:
            memory = accelerator.device_memory(end, stream)
        except MemoryError as error:
            raise MemoryError(
                f"a cache of experts takes {amount(end)} on the GPU: {error}; a smaller"
                " LVLLM_GPU_EXPERT_CACHE needs less"
            ) from None
        # Work that used this memory before may still be in the compute stream.
        free = accelerator.event()
        accelerator.record(free, accelerator.compute())
        accelerator.wait(free, stream)
        self.count, self.nbytes = count, end
        self.tensors = {
            name: memory[begin : begin + size].view(dtype).view(count, *shape)
            for (name, dtype, shape), begin, size in zip(of, begins, sizes, strict=True)
        }
