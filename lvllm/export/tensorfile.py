"""safetensors files, a tensor at a time: neither reading nor writing holds more than one.

A mapped file, as `safetensors.safe_open` gives it, would count towards resident memory as a whole,
and `safetensors.save_file` wants all tensors at once.
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

__all__ = ["Columns", "ExportError", "Tensor", "TensorFile", "header_of", "size_of_file", "write"]

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""safetensors' names of dtypes."""


class ExportError(ValueError):
    """One line for the user."""


@dataclass(frozen=True)
class Tensor:
    """A tensor as a header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Columns(TensorInfo):
    """A matrix [N, K] that lies transposed: in columns `first` to `first + N` of a row-major
    [K, of], whose bytes `start` and `end` are about.
    """

    first: int
    of: int

    def take(self, stored: torch.Tensor) -> torch.Tensor:
        """The matrix, from all that is stored there."""
        rows, columns = self.shape
        # All of it: PyTorch takes 2 ms to turn a [1024, 2048], and 8 ms for half of its columns.
        return stored.view(columns, self.of).T.contiguous()[self.first : self.first + rows]


class TensorFile:
    """An open safetensors file and its tensors, in the order of their bytes."""

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
        """The tensor, in memory of its own."""
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
        return stored.take(values) if isinstance(stored, Columns) else values.view(stored.shape)


def write(
    path: Path, tensors: list[Tensor], data: Iterable[torch.Tensor] | Iterator[torch.Tensor]
) -> None:
    """A safetensors file of `tensors`, whose `data` comes one after another. It is under its name
    only when it is whole and on the disk.
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
    """Bytes that `write` will write."""
    return len(header_of(tensors)) + sum(tensor.size for tensor in tensors)


def header_of(tensors: list[Tensor]) -> bytes:
    """The bytes before the data of the first of `tensors`."""
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
