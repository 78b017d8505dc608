"""The layers' caches of a worker, and the copying of a request's blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
)

from lvllm.prefill.memory import Memory, Place, block_bytes, copy_in, copy_out

__all__ = ["Caches", "Copies", "Copy", "Sizes"]


@dataclass(frozen=True)
class Copy:
    """Blocks of a request, to or from its memory."""

    request: str
    place: Place
    first: int
    """The number of the first of them in the request."""
    ids: tuple[int, ...]
    """Where they are in the worker's caches."""


@dataclass
class Copies(KVConnectorMetadata):
    """What a scheduler wants of its worker in a step."""

    copies: Sequence[Copy] = ()


@dataclass
class Sizes(KVConnectorHandshakeMetadata):
    """What a worker tells its scheduler."""

    block_bytes: int
    """Of a block in all layers together."""


class Caches:
    """Each layer's keys and values: [blocks, ...], in any order of the rest."""

    def __init__(self, caches: Mapping[str, torch.Tensor], blocks: int) -> None:
        """Raises ValueError for a layer whose cache has no blocks of its own."""
        places = set()
        self._layers: list[torch.Tensor] = []
        for name, cache in caches.items():
            if cache.shape[0] != blocks:
                raise ValueError(
                    f"LVLLM_PREFILL_ENGINE: the cache of {name} has the shape {tuple(cache.shape)},"
                    f" not {blocks} blocks"
                )
            # Layers may have one cache in common.
            place = (cache.data_ptr(), cache.shape)
            if place not in places:
                places.add(place)
                self._layers.append(cache)
        self._sizes = [block_bytes(cache) for cache in self._layers]
        self.block_bytes = sum(self._sizes)
        self.device = self._layers[0].device

    def open(self, place: Place) -> Memory:
        """Raises OSError if it is gone."""
        return Memory.open(place, self.block_bytes)

    def save(self, memory: Memory, copy: Copy) -> None:
        """Returns when the blocks are in memory, and counted."""
        ids = torch.tensor(copy.ids, device=self.device)
        for layer, cache in zip(memory.layers(self._sizes), self._layers, strict=True):
            copy_in(layer, copy.first, cache, ids)
        memory.count = copy.first + len(copy.ids)

    def load(self, memory: Memory, copy: Copy) -> None:
        """Returns when the blocks are in the caches. Raises ValueError if memory lacks some."""
        if memory.count < copy.first + len(copy.ids):
            raise ValueError(f"only {memory.count} of {memory.blocks} blocks are there")
        ids = torch.tensor(copy.ids, device=self.device)
        for layer, cache in zip(memory.layers(self._sizes), self._layers, strict=True):
            copy_out(layer, copy.first, cache, ids)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
