"""The caches of a model: which layers have them, and what happens between two steps."""

import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch

from lvllm.engine.expert_layer import ExpertLayer
from lvllm.gpu.accelerator import Accelerator, Stream
from lvllm.gpu.cache import saved
from lvllm.gpu.cache.cached_layer import CachedLayer
from lvllm.gpu.cache.counters import CacheCounters
from lvllm.gpu.cache.placement import Placement
from lvllm.gpu.cache.reads import EVERY, Reads
from lvllm.gpu.cache.replacing import STEP_BYTES, Replacing
from lvllm.gpu.cache.slots import Slots
from lvllm.gpu.packing import Signature, expert_bytes, signature
from lvllm.units import amount

__all__ = ["ExpertCache", "open_caches"]

# vLLM shows the loggers of this name. This package works without vLLM.
logger = logging.getLogger("vllm.plugins.lvllm")

UNKNOWN = 1e-3
"""The largest score of an expert before anything is counted: less than a read."""
SAVE_EVERY = 64
"""How many looks at the counts lie between two times that they are saved: some twenty seconds."""


def open_caches(
    accelerator: Accelerator,
    layers: Mapping[int, ExpertLayer],
    size: int,
    path: Path | None = None,
) -> list["ExpertCache"]:
    """Open a cache for each size and format of experts, as large as their share of all weights.

    A GGUF file in Q4_K_M has two: Q6_K in some down projections, and Q4_K in the others.

    Args:
        accelerator: the device with the slots.
        layers: the offloaded layers by their numbers. Their tensors are pinned.
        size: the bytes for slots. There are at most as many slots as there are experts.
        path: where the counts are saved, with a number for each cache but the first; None: nowhere.

    Raises:
        ValueError: if `size` holds no expert.
        MemoryError: if the device has too little memory.
    """
    kinds = defaultdict[tuple[int, Signature], dict[int, ExpertLayer]](dict)
    for number, layer in layers.items():
        kinds[layer.num_experts, signature(layer.tensors)][number] = layer
    experts = {kind: len(some) * kind[0] for kind, some in kinds.items()}
    each = {kind: expert_bytes(kind[1]) for kind in kinds}
    whole = {kind: experts[kind] * each[kind] for kind in kinds}
    total = sum(whole.values())
    # All kinds have the same share of their experts in slots.
    counts = {kind: min(size * n // total, n) for kind, n in experts.items()}
    if not any(counts.values()):
        # No kind's share holds an expert, but perhaps the whole does.
        most = max(whole, key=whole.__getitem__)
        counts = {most: size // each[most]}
        if not counts[most]:
            raise ValueError(
                f"LVLLM_GPU_EXPERT_CACHE of {amount(size)} holds no expert of {amount(each[most])}"
            )
    streams = accelerator.stream(), accelerator.stream()
    opened: list[ExpertCache] = []
    for kind, count in counts.items():
        if count:
            own = path.with_stem(f"{path.stem}-{len(opened)}") if path and opened else path
            opened.append(ExpertCache(accelerator, kinds[kind], count, own, streams))
    if left := len(layers) - sum(len(cache.layers) for cache in opened):
        logger.info("LvLLM: %d layers of other sizes have no part of the GPU's cache", left)
    return opened


class ExpertCache:
    """The slots of offloaded layers of one kind. Only the thread that queues the steps uses it.

    Args:
        accelerator: the device with the slots.
        layers: the layers by their numbers, whose experts have one signature.
        count: how many slots there are.
        path: where the counts are saved; None: nowhere.
        streams: for copies, and for products.

    Raises:
        MemoryError: if the device has too little memory.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        layers: Mapping[int, ExpertLayer],
        count: int,
        path: Path | None,
        streams: tuple[Stream, Stream],
    ) -> None:
        copies, computing = streams
        first = next(iter(layers.values()))
        of, experts = signature(first.tensors), first.num_experts
        self._slots = Slots(accelerator, of, count, copies)
        self._numbers, self._path = list(layers), path
        self._placement = Placement(len(layers), experts, count)
        self._reads = Reads(accelerator, (len(layers), experts))
        weights = [layer.tensors for layer in layers.values()]
        self._replacing = Replacing(accelerator, weights, experts, self._slots, copies)
        self._most = max(1, STEP_BYTES // expert_bytes(of)) * EVERY
        self._unsaved = 0  # looks at the counts
        self._counters: CacheCounters | None = None
        tables, reads = self._replacing.on_device, self._reads.on_device
        self.layers = {
            number: CachedLayer(
                accelerator, layer, self._slots, tables[place], reads[place], computing
            )
            for place, (number, layer) in enumerate(layers.items())
        }
        """The layers that have the cache, by their numbers."""
        self._begin()

    @property
    def nbytes(self) -> int:
        """The device's memory that the slots take."""
        return self._slots.nbytes

    def count(self, counters: CacheCounters) -> None:
        """From now on, count the reads that find a slot."""
        self._counters = counters

    def holds(self, number: int) -> list[bool] | None:
        """Tell which experts of a layer have slots for work that is queued now; None: no cache."""
        if number not in self.layers:
            return None
        found: list[bool] = (self._replacing.on_host[self._numbers.index(number)] >= 0).tolist()
        return found

    def step(self) -> bool:
        """Count and replace between two steps. This must not be called while a graph is captured.

        Returns whether an expert has lost its slot.
        """
        reads = self._reads.step()
        if reads is not None:
            self._look(reads)
        return self._replacing.step()

    def save(self) -> None:
        """Save the counts, if there are any that have not been saved.

        It asks the device for nothing, so what the last steps have read is left out.
        """
        if self._unsaved and self._path is not None:
            saved.write(self._path, self._numbers, self._placement.scores)
        self._unsaved = 0

    def _look(self, reads: torch.Tensor) -> None:
        """Count what some steps have read, and choose what is to be replaced."""
        if self._counters is not None:
            hits = int(reads[self._replacing.on_host >= 0].sum())
            self._counters.add(hits, int(reads.sum()) - hits, self._replacing.moved)
        self._placement.count(reads, EVERY)
        if self._replacing.idle:
            self._replacing.add(self._placement.moves(self._most))
        self._unsaved += 1
        if self._unsaved >= SAVE_EVERY:
            self.save()

    def _begin(self) -> None:
        """Fill all slots, by what an earlier server has counted, and say so."""
        begin = time.perf_counter()
        shape = self._placement.table.shape
        scores = saved.read(self._path, self._numbers, shape[1]) if self._path else None
        known = scores is not None
        if scores is None:
            # The first experts of all layers, then the second ones: so both work on every layer.
            scores = torch.linspace(UNKNOWN, 0, shape[1], dtype=torch.float32).expand(shape)
        self._placement.count(scores, 0)
        self._replacing.add(self._placement.moves(self._slots.count))
        self._replacing.settle()
        logger.info(
            "LvLLM: %s of the GPU hold %d of %d experts (%.0f%%), chosen %s, filled in %.1f s",
            amount(self.nbytes),
            self._slots.count,
            shape.numel(),
            100 * self._slots.count / shape.numel(),
            "by what was read before" if known else "evenly, as nothing was counted",
            time.perf_counter() - begin,
        )
