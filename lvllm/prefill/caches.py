"""The KV caches of a worker's layers, and copying the blocks of one request out of them or in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
)

from lvllm.prefill.memory import MappedMemory, MemoryAddress, block_bytes, copy_in, copy_out

__all__ = ["BlockCopy", "BlockSize", "CopyPlan", "LayerCaches"]


@dataclass(frozen=True)
class BlockCopy:
    """Consecutive blocks of a request that a worker copies to the request's memory or from it."""

    request: str
    address: MemoryAddress
    first: int
    """The number of the first block within the request."""
    ids: tuple[int, ...]
    """The numbers of the blocks in the worker's caches."""


@dataclass
class CopyPlan(KVConnectorMetadata):
    """What the scheduler asks of its worker in one step."""

    copies: Sequence[BlockCopy] = ()


@dataclass
class BlockSize(KVConnectorHandshakeMetadata):
    """What the worker tells its scheduler once it has its caches."""

    block_bytes: int
    """Bytes of one block over all layers together."""


class LayerCaches:
    """The keys and values of each layer: [blocks, ...], with the rest in any order."""

    def __init__(self, caches: Mapping[str, torch.Tensor], blocks: int) -> None:
        """Raises ValueError if the first dimension of a layer's cache is not `blocks`."""
        places = set()
        self._layers: list[torch.Tensor] = []
        for name, cache in caches.items():
            if cache.shape[0] != blocks:
                raise ValueError(
                    f"LVLLM_PREFILL_ENGINE: the cache of {name} has the shape {tuple(cache.shape)},"
                    f" not {blocks} blocks"
                )
            # Several layers may share one cache.
            place = (cache.data_ptr(), cache.shape)
            if place not in places:
                places.add(place)
                self._layers.append(cache)
        self._sizes = [block_bytes(cache) for cache in self._layers]
        self.block_bytes = sum(self._sizes)
        self.device = self._layers[0].device

    def open(self, address: MemoryAddress) -> MappedMemory:
        """Raises OSError if the memory is gone."""
        return MappedMemory.open(address, self.block_bytes)

    def save(self, memory: MappedMemory, copy: BlockCopy) -> None:
        """Copy blocks to `memory`. The call returns when they are there and counted."""
        ids = torch.tensor(copy.ids, device=self.device)
        for layer, cache in zip(memory.layers(self._sizes), self._layers, strict=True):
            copy_in(layer, copy.first, cache, ids)
        memory.count = copy.first + len(copy.ids)

    def load(self, memory: MappedMemory, copy: BlockCopy) -> None:
        """Copy blocks from `memory`. The call returns when they are in the caches.

        Raises ValueError if some of them are not written yet.
        """
        if memory.count < copy.first + len(copy.ids):
            raise ValueError(f"only {memory.count} of {memory.blocks} blocks are there")
        ids = torch.tensor(copy.ids, device=self.device)
        for layer, cache in zip(memory.layers(self._sizes), self._layers, strict=True):
            copy_out(layer, copy.first, cache, ids)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
