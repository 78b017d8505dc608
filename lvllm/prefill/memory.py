"""The memory in which one prompt's keys and values travel from one engine to the other.

It is an anonymous file (memfd) that the decoding engine's scheduler creates, and that the workers
of both engines open through /proc. It has no name, so nothing is left behind when the last process
that maps it ends, for whatever reason. The file holds the blocks of one layer after the other, each
laid out as in an engine's own cache, and a count of the blocks that are already written.
"""

import mmap
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["MappedMemory", "MemoryAddress", "OwnedMemory", "block_bytes", "copy_in", "copy_out"]

HEADER = 64
"""Bytes before the blocks. The first 8 of them count the blocks that are written."""


@dataclass(frozen=True)
class MemoryAddress:
    """Where to open the memory, while the process that created it keeps it open."""

    path: str
    inode: int
    """Tells this memory from another file that was opened under the same path later."""
    blocks: int

    def params(self) -> dict[str, Any]:
        """The address in the form that a request carries (`kv_transfer_params`)."""
        return asdict(self)


class MappedMemory:
    """A mapping of `blocks` blocks, each of `block_bytes` bytes over all layers together."""

    def __init__(self, descriptor: int, blocks: int, block_bytes: int) -> None:
        size = HEADER + blocks * block_bytes
        if (found := os.fstat(descriptor).st_size) != size:
            raise ValueError(f"{found} bytes, not {size}: the engines' caches are not alike")
        self._bytes = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
        self.blocks = blocks

    @classmethod
    def open(cls, address: MemoryAddress, block_bytes: int) -> "MappedMemory":
        """Raises OSError if the memory is gone, ValueError if its size is not the expected one."""
        descriptor = os.open(address.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_ino != address.inode:
                raise FileNotFoundError(f"{address.path} is another file by now")
            return cls(descriptor, address.blocks, block_bytes)
        finally:
            os.close(descriptor)  # The mapping stays.

    @property
    def count(self) -> int:
        """How many blocks are written, counted from the first one."""
        return int(self._bytes[:8].view(torch.int64))

    @count.setter
    def count(self, blocks: int) -> None:
        self._bytes[:8].view(torch.int64).fill_(blocks)

    def layers(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """A uint8 tensor [blocks, size] for each layer, given the bytes of one block of each."""
        parts = self._bytes[HEADER:].split([self.blocks * size for size in sizes])
        return [part.view(self.blocks, size) for part, size in zip(parts, sizes, strict=True)]


class OwnedMemory:
    """The memory in the process that creates it, which does not map it.

    It takes no pages until a worker writes to it.
    """

    def __init__(self, blocks: int, block_bytes: int) -> None:
        self._descriptor = os.memfd_create("lvllm-prefill")
        os.ftruncate(self._descriptor, HEADER + blocks * block_bytes)
        path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        self.address = MemoryAddress(path, os.fstat(self._descriptor).st_ino, blocks)

    def close(self) -> None:
        os.close(self._descriptor)


def block_bytes(cache: torch.Tensor) -> int:
    """Bytes of one block of a layer's cache [blocks, ...]."""
    return cache[0].numel() * cache.itemsize


def copy_in(layer: torch.Tensor, first: int, cache: torch.Tensor, ids: torch.Tensor) -> None:
    """Copy the blocks `ids` (int64, on the cache's device) of `cache` into `layer`.

    `layer` is uint8 [blocks, bytes]; its blocks from `first` on are written. The call returns when
    the data is there.
    """
    blocks = cache.index_select(0, ids).view(len(ids), -1)
    layer[first : first + len(ids)].view(cache.dtype).copy_(blocks)


def copy_out(layer: torch.Tensor, first: int, cache: torch.Tensor, ids: torch.Tensor) -> None:
    """Copy the other way, from `layer` to the blocks `ids` of `cache`.

    On a GPU the copy may still run in the current stream when the call returns.
    """
    blocks = layer[first : first + len(ids)].view(cache.dtype).view(len(ids), *cache.shape[1:])
    cache.index_copy_(0, ids, blocks.to(cache.device))
