"""The device's memory for experts of any layer: a tensor for each of an expert's tensors."""

from lvllm.gpu import packing
from lvllm.gpu.accelerator import Accelerator, Stream
from lvllm.gpu.packing import Signature
from lvllm.units import amount

__all__ = ["Slots"]


class Slots:
    """Room for `count` experts of one signature.

    `tensors` has, by name, a tensor [count, ...] on the device. Its contents are anything until
    `stream`, which alone may write it, has copied an expert there.

    Raises MemoryError, with the numbers, if the device has too little memory.
    """

    def __init__(self, accelerator: Accelerator, of: Signature, count: int, stream: Stream) -> None:
        self.count, self.nbytes = count, packing.packed_bytes(of, count)
        try:
            memory = accelerator.memory_for(self.nbytes, stream)
        except MemoryError as error:
            raise MemoryError(
                f"a cache of experts takes {amount(self.nbytes)} on the GPU: {error}; a smaller"
                " LVLLM_GPU_EXPERT_CACHE needs less"
            ) from None
        self.tensors = packing.views(of, count, memory)
