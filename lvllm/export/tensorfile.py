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

__all__ = ["DTYPES", "ExportError", "Tensor", "TensorFile", "header_of", "size_of_file", "write"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names."""
LARGEST_HEADER = 100_000_000
"""Bytes that the format allows."""


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


class TensorFile:
    """An open safetensors file; ExportError if it is none, or cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self._file: BinaryIO = path.open("rb", buffering=0)
        try:
            header = self._header()
            self.tensors: dict[str, Tensor] = {}
            self._offsets: dict[str, int] = {}
            for name, entry in header.items():
                if name != "__metadata__":
                    self._add(name, entry)
        except (KeyError, TypeError, ValueError) as error:
            self._file.close()
            reason = str(error) if isinstance(error, ExportError) else "its header is damaged"
            raise ExportError(f"{path}: {reason}") from None

    def _header(self) -> dict[str, Any]:
        length = int.from_bytes(self._file.read(8), "little")
        self._start = 8 + length
        if not 2 <= length <= LARGEST_HEADER or self._start > self.size:
            raise ExportError(f"no safetensors file, or cut short at {self.size} bytes")
        header: dict[str, Any] = json.loads(self._file.read(length))
        return header

    def _add(self, name: str, entry: dict[str, Any]) -> None:
        if entry["dtype"] not in DTYPES:
            raise ExportError(f"{name} has the unknown dtype {entry['dtype']!r}")
        tensor = Tensor(name, entry["dtype"], tuple(entry["shape"]))
        begin, end = entry["data_offsets"]
        if end - begin != tensor.size:
            raise ExportError(f"{name} has {end - begin} bytes, but its shape has {tensor.size}")
        if self._start + end > self.size:
            raise ExportError(f"cut short: {name} ends at byte {self._start + end} of {self.size}")
        self.tensors[name] = tensor
        self._offsets[name] = self._start + begin

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in memory of its own."""
        tensor = self.tensors[name]
        data = torch.empty(tensor.size, dtype=torch.uint8)
        view = memoryview(data.numpy().data)
        self._file.seek(self._offsets[name])
        while view:
            count = self._file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise ExportError(f"{self.path}: cut short while {name} was read")
            view = view[count:]
        return data.view(DTYPES[tensor.dtype]).view(tensor.shape)


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
