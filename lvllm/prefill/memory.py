"""The memory that takes one prompt's keys and values from one engine to the other.

A memfd of the decoding engine's scheduler, which workers of both engines open through /proc: it has
no name, and ends with the last process that maps it, however that ends. It holds the blocks of one
layer after the other, each as one engine's cache has them, and counts how many are there.
"""

import mmap
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["Held", "Memory", "Place", "block_bytes", "copy_in", "copy_out"]

HEADER = 64
"""Bytes before the blocks, of which the first 8 count them."""


@dataclass(frozen=True)
class Place:
    """Where the memory is found, as long as the process that made it holds it."""

    path: str
    inode: int
    """Another file may have come under that path since."""
    blocks: int

    def params(self) -> dict[str, Any]:
        """In the form that a request carries."""
        return asdict(self)


class Memory:
    """`blocks` blocks of a request, with `block_bytes` bytes in all layers together."""

    def __init__(self, descriptor: int, blocks: int, block_bytes: int) -> None:
        size = HEADER + blocks * block_bytes
        if (found := os.fstat(descriptor).st_size) != size:
            raise ValueError(f"{found} bytes, not {size}: the engines' caches are not alike")
        self._bytes = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
        self.blocks = blocks

    @classmethod
    def open(cls, place: Place, block_bytes: int) -> "Memory":
        """Raises OSError if it is gone, ValueError if the sizes do not agree."""
        descriptor = os.open(place.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_ino != place.inode:
                raise FileNotFoundError(f"{place.path} is another file by now")
            return cls(descriptor, place.blocks, block_bytes)
        finally:
            os.close(descriptor)  # the mapping stays

    @property
    def count(self) -> int:
        """Blocks that are there, from the first one on."""
        return int(self._bytes[:8].view(torch.int64))

    @count.setter
    def count(self, blocks: int) -> None:
        self._bytes[:8].view(torch.int64).fill_(blocks)

    def layers(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """uint8 [blocks, size] of each layer, whose blocks have `sizes` bytes."""
        parts = self._bytes[HEADER:].split([self.blocks * size for size in sizes])
        return [part.view(self.blocks, size) for part, size in zip(parts, sizes, strict=True)]


class Held:
    """The memory as its maker has it: without pages until somebody writes, and not mapped."""

    def __init__(self, blocks: int, block_bytes: int) -> None:
        self._descriptor = os.memfd_create("lvllm-prefill")
        os.ftruncate(self._descriptor, HEADER + blocks * block_bytes)
        path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        self.place = Place(path, os.fstat(self._descriptor).st_ino, blocks)

    def close(self) -> None:
        os.close(self._descriptor)


def block_bytes(cache: torch.Tensor) -> int:
    """Of a layer's cache [blocks, ...]."""
    return cache[0].numel() * cache.itemsize


def copy_in(layer: torch.Tensor, first: int, cache: torch.Tensor, ids: torch.Tensor) -> None:
    """Blocks `ids` (int64, on the cache's device) of `cache` to `layer` [blocks, bytes] from its
    block `first` on. Returns when they are there.
    """
    blocks = cache.index_select(0, ids).view(len(ids), -1)
    layer[first : first + len(ids)].view(cache.dtype).copy_(blocks)


def copy_out(layer: torch.Tensor, first: int, cache: torch.Tensor, ids: torch.Tensor) -> None:
    """The other way. On a GPU it goes on in the current stream."""
    blocks = layer[first : first + len(ids)].view(cache.dtype).view(len(ids), *cache.shape[1:])
    cache.index_copy_(0, ids, blocks.to(cache.device))
