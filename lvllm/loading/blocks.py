"""A tensor of a GGUF file whose values are in blocks: they are computed as they are copied."""

import math

import torch

from lvllm.checkpoint.headers import TensorInfo
from lvllm.loading.source import Fill, Source

__all__ = ["BlockSource"]

PIECE = 1 << 20
"""Values that are computed at a time. In float32 they take 4 MiB, and the gguf package takes some
copies of them."""


class BlockSource(Source):
    """The values of a tensor in blocks, in float32. Rows are in whole blocks."""

    def __init__(self, info: TensorInfo, fill: Fill) -> None:
        super().__init__(info, fill)
        self._columns = info.shape[-1]
        self._rows = math.prod(info.shape) // self._columns
        self._row_bytes = info.nbytes // self._rows

    def read(self, layout: torch.Tensor) -> torch.Tensor:
        """A plain tensor with the values and strides of `layout`, a view of the whole tensor."""
        if layout.dtype != torch.float32:  # somebody looks at the bytes of the values
            self.load()
        if self.memory is not None or layout.numel() == 0:
            return super().read(layout)
        size, stride, first = layout.size(), layout.stride(), int(layout.storage_offset())
        last = first + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        begin, end = first // self._columns, last // self._columns + 1
        values = self._values(begin, end)
        return values.as_strided(size, stride, first - begin * self._columns)

    def copy(self, layout: torch.Tensor, to: torch.Tensor) -> bool:
        """Compute what `layout` sees in pieces, and copy each to its part of `to`.

        Returns False, and reads nothing, for a view whose pieces would each need the whole tensor,
        and for a tensor of another shape.
        """
        if self.memory is not None or to.size() != layout.size() or layout.dim() == 0:
            return False
        if layout.stride(0) < max(layout.stride()):
            return False
        rows = max(1, PIECE // max(1, math.prod(layout.shape[1:])))
        for part, view in zip(to.split(rows), layout.split(rows), strict=True):
            part.copy_(self.read(view))
        return True

    def load(self) -> None:
        """Keep the values in memory from now on."""
        if self.memory is None:
            self.memory = self._values(0, self._rows).flatten().view(torch.uint8)

    def _values(self, begin: int, end: int) -> torch.Tensor:
        """Rows of the tensor: float32 [end - begin, columns]."""
        # The package takes 0.7 s to import, which only GGUF files are to pay for.
        import numpy as np
        from gguf import GGMLQuantizationType, dequantize

        kind = GGMLQuantizationType[str(self.info.blocks)]
        rows = max(1, PIECE // self._columns)
        found = torch.empty((end - begin, self._columns), dtype=torch.float32)
        for first in range(begin, end, rows):
            part = found[first - begin : first - begin + rows]
            raw = torch.empty((len(part), self._row_bytes), dtype=torch.uint8)
            self._fill(raw, first * self._row_bytes)
            with np.errstate(all="ignore"):  # A bad scale is refused below.
                part.copy_(torch.from_numpy(dequantize(raw.numpy(), kind)))
            if not part.isfinite().all():
                raise self.info.refuse("holds NaN or infinity")
        return found
