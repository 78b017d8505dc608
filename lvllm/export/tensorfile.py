"""Read and write safetensors files with one tensor in memory at a time.

`safetensors.safe_open` maps the file, all of which then counts as resident memory, and
`safetensors.save_file` needs all tensors at once.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch

from lvllm.checkpoint.headers import DTYPES, TensorInfo
from lvllm.errors import LvllmError

__all__ = [
    "NAMES",
    "ExportError",
    "Tensor",
    "TensorFile",
    "TransposedMatrix",
    "header_of",
    "size_of_file",
    "write",
]

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The names that safetensors has for dtypes."""


class ExportError(LvllmError):
    """The checkpoint cannot be exported; the message is one line for the user."""


@dataclass(frozen=True)
class Tensor:
    """A tensor as the header of a file describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class TransposedMatrix(TensorInfo):
    """A matrix [N, K] that is stored transposed, as columns of a larger matrix.

    It is in columns `first` to `first + N` of a row-major matrix [K, `stored`], which begins at the
    byte `start` of the file and ends before `end`.
    """

    first: int
    stored: int

    def take(self, data: torch.Tensor) -> torch.Tensor:
        """This matrix, out of the `data` of the larger one."""
        rows, columns = self.shape
        # The whole matrix is transposed. PyTorch takes 2 ms for a [1024, 2048], but 8 ms for half
        # of its columns.
        return data.view(columns, self.stored).T.contiguous()[self.first : self.first + rows]


class TensorFile:
    """An open safetensors file and its tensors, in the order in which they are stored."""

    def __init__(self, path: Path, tensors: Iterable[TensorInfo]) -> None:
        self.path = path
        placed = sorted(tensors, key=lambda tensor: tensor.start)
        self.tensors = {t.name: Tensor(t.name, NAMES[t.dtype], t.shape) for t in placed}
        self._stored = {tensor.name: tensor for tensor in placed}
        self._file: BinaryIO = path.open("rb", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into memory of its own."""
        stored = self._stored[name]
        data = torch.empty(stored.nbytes, dtype=torch.uint8)
        view = memoryview(data.numpy().data)
        self._file.seek(stored.start)
        while view:
            count = self._file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise ExportError(f"{self.path}: cut short while {name} was read")
            view = view[count:]
        values = data.view(stored.dtype)
        return (
            stored.take(values)
            if isinstance(stored, TransposedMatrix)
            else values.view(stored.shape)
        )


def write(
    path: Path, tensors: list[Tensor], data: Iterable[torch.Tensor] | Iterator[torch.Tensor]
) -> None:
    """Write a safetensors file of `tensors`, whose `data` comes one tensor after another.

    The file gets its name only when all of it is on the disk.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        file.write(header_of(tensors))
        for tensor, values in zip(tensors, data, strict=True):
            if values.dtype != DTYPES[tensor.dtype] or tuple(values.shape) != tensor.shape:
                raise AssertionError(f"{tensor} was announced, {values.dtype} {values.shape} came")
            file.write(values.contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def size_of_file(tensors: list[Tensor]) -> int:
    """How many bytes `write` will write."""
    return len(header_of(tensors)) + sum(tensor.size for tensor in tensors)


def header_of(tensors: list[Tensor]) -> bytes:
    """The header of a file of `tensors`: all bytes before the first tensor's data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.size
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
