"""The headers of a safetensors checkpoint, checked before any weight is read.

A safetensors file is the length of its header (8 bytes, little-endian), the header, and the data.
The header is a JSON object that maps each tensor's name to its dtype, its shape and `data_offsets`,
the first byte and the end of its values within the data. The tensors cover the data without gaps
and without overlaps.

The safetensors library does not serve here: its Python interface does not give the byte offsets,
which the reader needs, and its errors about a damaged header name neither the file nor the tensor.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch

from lvllm.checkpoint.files import open_regular
from lvllm.errors import LvllmError, quoted, readable

__all__ = [
    "INDEX",
    "LFS_POINTER",
    "Checkpoint",
    "CheckpointError",
    "TensorInfo",
    "pickle_refused",
    "pointer_refused",
    "read_header",
]

INDEX = "model.safetensors.index.json"
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
LONGEST_HEADER = 100_000_000
"""The format allows at most this many bytes."""
DIMENSIONS = 64
"""A tensor of PyTorch has at most this many."""
LFS_POINTER = b"version https://git-lfs"
# The suffixes of pickles, and the load format of vLLM that reads each.
PICKLES = {".bin": "npcache", ".pt": "pt", ".pth": None}


class CheckpointError(LvllmError):
    """A checkpoint that cannot be read. The text names the file, the tensor and the fault."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The place of a tensor: bytes `start` to `end` of `file`, in row-major order."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    blocks: str | None = field(default=None, kw_only=True)
    """How the file stores the values, as ggml calls it: Q4_K. None: as numbers of `dtype`."""

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def refuse(self, fault: str) -> CheckpointError:
        """An error about this tensor."""
        return CheckpointError(f"{self.file}: tensor {quoted(self.name)}: {fault}")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of all safetensors files of a model, by name."""

    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(
        cls, folder: str | Path, pattern: str = "*.safetensors", index: str = INDEX
    ) -> "Checkpoint":
        """Read the headers of the files in a local folder that match `pattern`.

        If the folder has an `index`, only the files that it names are read. Raises CheckpointError.
        """
        folder = Path(folder)
        files = sorted(folder.glob(pattern))
        placed = _read_index(folder / index)
        if placed is not None:
            for name, file in placed.items():
                if file not in files:
                    raise CheckpointError(
                        f"{folder / index}: tensor {quoted(name)} is in {readable(file.name)},"
                        " which is not there"
                    )
            files = sorted(set(placed.values()))
        if not files:
            raise _nothing_to_read(folder, pattern)
        checkpoint = cls.of_files(files)
        for name, file in (placed or {}).items():
            found = checkpoint.tensors.get(name)
            if found is None or found.file != file:
                where = "" if found is None else f" (it is in {found.file.name})"
                raise CheckpointError(
                    f"{file}: tensor {quoted(name)} is not in this file{where}, but {index} says so"
                )
        return checkpoint

    @classmethod
    def of_files(cls, files: Iterable[str | Path]) -> "Checkpoint":
        """Read the headers of these files. Raises CheckpointError."""
        paths = tuple(Path(file) for file in files)
        tensors: dict[str, TensorInfo] = {}
        for path in paths:
            for tensor in read_header(path):
                if tensor.name in tensors:
                    raise tensor.refuse(f"is in {tensors[tensor.name].file.name} too")
                tensors[tensor.name] = tensor
        return cls(paths, tensors)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes. Raises CheckpointError."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(len(LFS_POINTER))
            if first == LFS_POINTER:
                raise pointer_refused(path)
            if size < 8:
                raise CheckpointError(
                    f"{path}: truncated: has {size} bytes, a safetensors file at least 8"
                )
            length = int.from_bytes(first[:8], "little")
            if length > LONGEST_HEADER:
                raise CheckpointError(
                    f"{path}: is no safetensors file: a header of {length} bytes, allowed are"
                    f" {LONGEST_HEADER}"
                )
            if 8 + length > size:
                raise CheckpointError(
                    f"{path}: truncated: has {size} bytes, its header alone has {8 + length}"
                )
            file.seek(8)
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    return _checked(path, _parsed(path, header), 8 + length, size)


def _parsed(path: Path, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in found if names.count(name) > 1)
            raise CheckpointError(f"{path}: tensor {quoted(twice)} is in the header twice")
        return found

    try:
        fields = json.loads(header.decode(), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: the header is no JSON object")
    fields.pop("__metadata__", None)
    return fields


def _checked(path: Path, fields: dict[str, Any], data: int, size: int) -> list[TensorInfo]:
    """The tensors of a header, in the order of their bytes.

    The data begin at byte `data` of the file, which has `size` bytes.
    """
    tensors = [_tensor(path, name, field, data) for name, field in fields.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    end = data
    for tensor in tensors:
        if tensor.start != end:
            kind = "overlaps the one before it" if tensor.start < end else "leaves a gap before it"
            raise tensor.refuse(
                f"{kind}: data_offsets begin at {tensor.start - data}, the last one ended at"
                f" {end - data}"
            )
        end = tensor.end
        if end > size:
            raise tensor.refuse(f"truncated: ends at byte {end}, the file has {size}")
    if end != size:
        raise CheckpointError(f"{path}: has {size - end} bytes behind its last tensor")
    return tensors


def _tensor(path: Path, name: str, field: Any, data: int) -> TensorInfo:
    def refuse(fault: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {quoted(name)}: {fault}")

    if not isinstance(field, dict):
        raise refuse("the header has no dtype, shape and data_offsets")
    dtype, shape, offsets = field.get("dtype"), field.get("shape"), field.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"unknown dtype {quoted(dtype)}; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > DIMENSIONS:
        raise refuse(f"shape is {quoted(shape)}, wanted a list of at most {DIMENSIONS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"data_offsets is {quoted(offsets)}, wanted [begin, end]")
    begin, end = offsets
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != wanted:
        raise refuse(
            f"{dtype} {quoted(shape)} takes {wanted} bytes, data_offsets {offsets} have"
            f" {end - begin}"
        )
    return TensorInfo(name, path, DTYPES[dtype], tuple(shape), data + begin, data + end)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 1 << 63 for value in values
    )


def _read_index(path: Path) -> dict[str, Path] | None:
    """The file of each tensor, or None if there is no index."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            written = json.loads(file.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON: {error}") from None
    placed = written.get("weight_map") if isinstance(written, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise CheckpointError(f"{path}: has no weight_map of tensor names to files")
    return {name: path.parent / file for name, file in placed.items()}


def pickle_refused(file: Path) -> CheckpointError:
    """An error about a checkpoint that has this pickle and no safetensors."""
    load_format = PICKLES.get(file.suffix)
    advice = f"load-format={load_format} reads it" if load_format else "convert it"
    return CheckpointError(
        f"{file}: is a pickle, which may run code when it is read; by default only safetensors are"
        f" read, and the folder has none: {advice}"
    )


def pointer_refused(file: Path) -> CheckpointError:
    """An error about a file that holds a git-LFS pointer, which begins with LFS_POINTER."""
    return CheckpointError(
        f"{file}: is a git-LFS pointer, not the weights: run `git lfs pull` in the folder or"
        " download the model anew"
    )


def _nothing_to_read(folder: Path, pattern: str) -> CheckpointError:
    for suffix in PICKLES:
        for file in sorted(folder.glob(f"*{suffix}")):
            return pickle_refused(file)
    return CheckpointError(f"{folder}: has no weights: no {pattern}")
