"""Where the values of a `FileTensor` come from: the bytes of a file, as they are."""

import ctypes
from collections.abc import Callable

import torch

from lvllm import formats
from lvllm.checkpoint.headers import TensorInfo

__all__ = ["Fill", "Source"]

Fill = Callable[[memoryview, int], None]
"""Fills all of the memory with the bytes of a file from a byte on.

Raises EOFError if the file ends before, and OSError if the system cannot read it.
"""


class Source:
    """A whole tensor: in its file, or in memory once an operation has written to it."""

    def __init__(self, info: TensorInfo, fill: Fill) -> None:
        self.info = info
        self._fill_from_file = fill
        self.wanted = False
        """Whether any bytes of the tensor were asked for."""
        self.memory: torch.Tensor | None = None

    def read(self, layout: torch.Tensor) -> torch.Tensor:
        """A plain tensor with the values and strides of `layout`, a view of the whole tensor."""
        size, stride, first = layout.size(), layout.stride(), layout.storage_offset()
        if self.memory is None:
            # One read takes all bytes from the view's first element to its last.
            extent = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
            extent = extent * layout.itemsize if layout.numel() else 0
            memory = torch.empty(extent, dtype=torch.uint8, device="cpu")
            self._fill(memory, int(first) * layout.itemsize)
            first = 0
        else:
            memory = self.memory
        return memory.view(layout.dtype).as_strided(size, stride, first)

    def copy(self, layout: torch.Tensor, to: torch.Tensor) -> bool:
        """Read what `layout` sees straight into the memory of `to`.

        Returns False, and reads nothing, unless the bytes of both are contiguous and alike.
        """
        if (
            self.memory is not None
            or to.device.type != "cpu"
            or to.dtype != layout.dtype
            or to.size() != layout.size()
            or not to.is_contiguous()
            or not layout.is_contiguous()
        ):
            return False
        self._fill(to, int(layout.storage_offset()) * layout.itemsize)
        return True

    def load(self) -> None:
        """Keep the tensor in memory from now on."""
        if self.memory is None:
            memory = torch.empty(self.info.nbytes, dtype=torch.uint8, device="cpu")
            self._fill(memory, 0)
            self.memory = memory

    def _fill(self, to: torch.Tensor, offset: int) -> None:
        """Fill the contiguous tensor `to` with the bytes from `offset` on."""
        self.wanted = True
        if to.numel() == 0:
            return
        size = to.numel() * to.itemsize
        memory = memoryview((ctypes.c_char * size).from_address(to.data_ptr())).cast("B")
        try:
            self._fill_from_file(memory, self.info.start + offset)
        except EOFError:
            raise self.info.refuse("the file was truncated while it was read") from None
        except OSError as error:
            raise self.info.refuse(error.strerror or str(error)) from None
        name, dtype = self.info.name, self.info.dtype
        if formats.is_weight_scale(name) and size % dtype.itemsize == 0:
            self._check_numbers(torch.frombuffer(memory, dtype=dtype))

    def _check_numbers(self, scales: torch.Tensor) -> None:
        """Refuse NaN and infinity: a scale multiplies a whole group of weights, so that one bad
        scale spoils every token.
        """
        for some in scales.split(1 << 20):  # the float32 copy of an 8-bit type takes 4 MiB
            if some.dtype == torch.uint8:  # e8m0, where 255 is NaN
                bad = some == 255
            elif some.is_floating_point():
                bad = ~torch.isfinite(some if some.itemsize > 1 else some.float())
            else:
                return
            if bad.any():
                raise self.info.refuse(f"{int(bad.sum())} of its scales are NaN or infinite")
            if formats.is_divisor(self.info.name) and not some.all():
                raise self.info.refuse("is 0, and weights are divided by it")
