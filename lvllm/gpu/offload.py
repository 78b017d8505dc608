"""The layers of one model whose experts lie on the host, and what these layers share."""

import logging
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from lvllm.engine.expert_layer import ExpertLayer
from lvllm.gpu import break_even, warm_up
from lvllm.gpu.accelerator import Accelerator
from lvllm.gpu.break_even import MeasuredThreshold
from lvllm.gpu.cache.expert_cache import ExpertCache, open_caches
from lvllm.gpu.hybrid import HybridCall, PinnedBuffers, raise_host_call_error, running_host_call
from lvllm.gpu.offloaded_layer import OffloadedLayer
from lvllm.gpu.products import require_whole_words
from lvllm.gpu.ring import StagingRing
from lvllm.gpu.watchdog import StreamSteps, Watchdog
from lvllm.units import gib

__all__ = ["Offload", "caches", "mark_others", "mark_step", "waiting_for_cache"]

# vLLM shows the loggers of this name. This package works without vLLM.
logger = logging.getLogger("vllm.plugins.lvllm")


class Offload:
    """The offloaded layers of a model.

    Each layer is announced while the model is built, and added when its weights are loaded. When
    the last announced layer is added, the memory that all layers share is allocated.

    Args:
        accelerator: the device that has the activations.
        tokens: the number of tokens of the largest batch.
        threshold: batches of at least this many tokens are computed on the device; 0: none is. A
            MeasuredThreshold is measured when the last layer is added.
        ahead: the number of layers that are copied to the device before they are needed.
        staging_bytes: the limit of the device's memory for copies of experts.
        call: LVLLM_GPU_CALL, how the device calls lk.
        cache_bytes: the device's memory for a cache of experts; "auto": `open_cache` tells it.
        reads_path: where the cache saves how often experts are read.
        defer: LVLLM_DEFER_EXPERTS, how many experts of a token are added one layer later.
        watchdog: to be told of copies, host calls and steps; it is closed at this object's end.
        dtype: that of the activations.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        tokens: int,
        threshold: int | MeasuredThreshold = 0,
        ahead: int = 0,
        staging_bytes: int = 1 << 30,
        call: str = "hostfunc",
        cache_bytes: int | Literal["auto"] = 0,
        reads_path: Path | None = None,
        defer: int = 0,
        watchdog: Watchdog | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.accelerator = accelerator
        self._threshold = threshold
        self._streams = isinstance(threshold, MeasuredThreshold) or threshold > 0
        self._tokens, self._watchdog = tokens, watchdog
        self._ahead, self._staging_bytes, self._call = ahead, staging_bytes, call
        self.cache_bytes, self._reads_path = cache_bytes, reads_path
        self._pins = self._streams or cache_bytes != 0
        self._defer, self._dtype = defer, dtype
        if watchdog is not None:
            weakref.finalize(self, watchdog.close).atexit = False
        self._model: weakref.ref[object] | None = None
        self._announced: list[int] = []
        # The layers refer to this object, so it refers to them weakly.
        self._added: weakref.WeakValueDictionary[int, OffloadedLayer] = (
            weakref.WeakValueDictionary()
        )
        self._pinned, self._pinning = 0, 0.0  # bytes, and the seconds that they took
        self._steps: StreamSteps | None = None
        self._ring: StagingRing | None = None
        self.caches: list[ExpertCache] = []
        """The caches, once they are open."""
        self._complete = False

    @staticmethod
    def announce(number: int, model: object, make: Callable[[], "Offload"]) -> "Offload":
        """Announce a layer of `model` while the model is built, and return the layer's Offload.

        That is the Offload of the layer that was announced last, or what `make` returns if that one
        belongs to another model, is complete, or knows a layer with this number already: then the
        building of a model was given up and begins again.
        """
        global _building
        offload = _building() if _building else None
        if (
            offload is None
            or offload._model is None
            or offload._model() is not model
            or offload._complete
            or number in offload._announced
        ):
            offload = make()
            offload._model = weakref.ref(model)
            _building = weakref.ref(offload)
        offload._announced.append(number)
        return offload

    def add(
        self, number: int, name: str, experts: ExpertLayer, topk: int, routed: int | None = None
    ) -> OffloadedLayer:
        """Add an announced layer whose weights are loaded. The caller keeps the result.

        `topk` is the number of experts per token, and `routed` the number of experts that the
        router chooses from, if other ranks hold some of them.

        Raises MemoryError, in one line, if the host's memory cannot be pinned or the device has too
        little memory for the copies of experts, and ValueError if a cache of them could not compute
        the layer in a graph.
        """
        if self.cache_bytes:
            try:
                require_whole_words(experts, self.accelerator.device)
            except ValueError as error:
                raise ValueError(f"{name}: {error}, or LVLLM_GPU_EXPERT_CACHE=0") from None
        layer = OffloadedLayer(
            self, self.accelerator, number, name, experts, topk, routed or experts.num_experts
        )
        if self._pins:
            begin = time.perf_counter()
            for what, tensor in experts.tensors.items():
                try:
                    self.accelerator.pin(tensor)
                except RuntimeError as error:
                    raise MemoryError(f"{name}: {what}: {error}") from None
                weakref.finalize(layer, self.accelerator.unpin, tensor).atexit = False
            self._pinned += layer.size()
            self._pinning += time.perf_counter() - begin
        self._added[number] = layer
        if all(number in self._added for number in self._announced):
            self._complete = True
            layers = [self._added[number] for number in sorted(self._announced)]
            self._share(layers)
            if self._defer:  # The measurements of _share call layers outside a pass.
                layers[0].call.first = layers[-1].call.last = True
                layers[0].call.buffers.defer(self._defer)
            _live.add(self)
        return layer

    def _share(self, layers: list[OffloadedLayer]) -> None:
        """Allocate what all layers of the model share, and hand it to them."""
        watchdog = self._watchdog
        buffers = PinnedBuffers(
            self.accelerator,
            self._tokens,
            {(layer.experts.hidden_size, layer.topk) for layer in layers},
            # The stand-in uses a stream of its own here, so that tests notice a missing wait.
            stream=self.accelerator.stream() if self.accelerator.name == "host" else None,
            steps=watchdog.steps() if watchdog else None,
        )
        said = buffers.choose_call(self._call, layers[0].experts)
        logger.info("LvLLM: LVLLM_GPU_CALL=%s is %s", self._call, said)
        for layer in layers:
            layer.call = HybridCall(buffers, layer.experts, layer.topk, layer.name)
        if self.accelerator.compiles:
            warm_up.hybrid(layers, self._dtype)
        if self._pins:
            logger.info(
                "LvLLM: pinned %s of experts in %.1f s while loading, %.1f GB/s",
                gib(self._pinned),
                self._pinning,
                self._pinned / 1e9 / self._pinning,
            )
        if self._streams:
            self._open_ring(layers)
        if self.cache_bytes and self.cache_bytes != "auto":
            self.open_cache(self.cache_bytes)

    def open_cache(self, size: int) -> None:
        """Open the caches of experts with so many bytes. All layers have been added by now.

        Raises ValueError if they hold no expert, and MemoryError if the device has no room.
        """
        layers = {number: self._added[number].experts for number in sorted(self._announced)}
        self.caches = open_caches(self.accelerator, layers, size, self._reads_path)
        of_layers = {number: cache for cache in self.caches for number in cache.layers}
        for number, cache in of_layers.items():
            self._added[number].cache = cache.layers[number]
        if self._ring is not None:
            self._ring.leave_out(lambda n: of_layers[n].holds(n) if n in of_layers else None)
        if self.accelerator.compiles:
            added = [self._added[number] for number in of_layers]
            warm_up.cached(added, self._tokens, self._dtype)

    def _open_ring(self, layers: list[OffloadedLayer]) -> None:
        """Allocate the ring, and measure the threshold if that is asked for."""
        weights = {layer.number: layer.experts.tensors for layer in layers}
        ring = StagingRing(
            self.accelerator, weights, self._ahead, self._staging_bytes, self._watchdog
        )
        if self.accelerator.compiles:
            warm_up.streams(layers, ring, self._tokens, self._dtype)
        threshold, rates = self._threshold, None
        if isinstance(threshold, MeasuredThreshold):
            by_size = sorted(layers, key=OffloadedLayer.size)
            median = by_size[len(layers) // 2]
            threshold, rates = break_even.measure_threshold(
                threshold, ring, median, len(layers), self._tokens
            )
            raise_host_call_error()
        if threshold == 0:
            # The ring's memory is freed here, before vLLM measures what is left. The experts stay
            # pinned, since lk computes on them anyway.
            return
        self._ring = ring
        for layer in layers:
            layer.ring, layer.threshold, layer.rates = ring, threshold, rates

    def _mark_step(self) -> None:
        if self._ring is not None:
            self._ring.tally()
        lost = [cache.step() for cache in self.caches]
        if any(lost) and self._ring is not None:
            self._ring.abort()
        if (steps := self._compute_steps()) is not None:
            steps.mark(running_host_call)

    def _mark_others(self) -> None:
        if (steps := self._compute_steps()) is not None:
            steps.mark_others()

    def _compute_steps(self) -> StreamSteps | None:
        if self._watchdog is not None and self._steps is None:
            self._steps = self._watchdog.follow(self.accelerator.compute())
        return self._steps


_building: weakref.ref[Offload] | None = None
"""The Offload of the layer that was announced last."""
_live: weakref.WeakSet[Offload] = weakref.WeakSet()
"""The complete Offloads of this process. There may be a main model and a draft model."""


def caches() -> list[ExpertCache]:
    """Return the caches of this process."""
    return [cache for one in _live for cache in one.caches]


def waiting_for_cache() -> list[Offload]:
    """Return the models of this process whose caches have yet to be opened (`cache_bytes`)."""
    return [one for one in _live if one.cache_bytes == "auto" and not one.caches]


def mark_step() -> None:
    """Tell the watchdogs that all work in the compute stream is due. Call this after each step.

    What is known of the copies by now is counted, and experts in the cache are replaced.

    The replay of a graph is only seen here, since it makes no call that this package knows of.
    """
    for offload in list(_live):
        offload._mark_step()


def mark_others() -> None:
    """Tell the watchdogs that the compute stream waits for other processes before its next work.

    Call this once these waits are in the stream.
    """
    for offload in list(_live):
        offload._mark_others()
