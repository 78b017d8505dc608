"""One layer whose experts lie on the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto

import torch

from lvllm.engine.counters import Reason
from lvllm.engine.expert_layer import ExpertLayer
from lvllm.gpu import operator, shared, streamed
from lvllm.gpu.accelerator import Accelerator
from lvllm.gpu.cache.cached_layer import CachedLayer
from lvllm.gpu.counters import StreamedCounters
from lvllm.gpu.hybrid import HybridCall, raise_host_call_error
from lvllm.gpu.ring import StagingRing
from lvllm.gpu.shares import Rates

__all__ = ["ComputePath", "OffloadedLayer", "choose_path", "concentrated_routing"]


class ComputePath(Enum):
    """Where a batch of an offloaded layer is computed."""

    CPU = auto()
    STREAMED = auto()


def choose_path(tokens: int, capturing: bool, threshold: int) -> ComputePath:
    """Return STREAMED for batches of at least `threshold` tokens; a threshold of 0 turns it off.

    A batch that is being captured in a graph is computed on the CPU. Graphs are for decoding, and
    each replay of a graph would copy the weights again.
    """
    return (
        ComputePath.STREAMED
        if threshold and tokens >= threshold and not capturing
        else ComputePath.CPU
    )


class OffloadedLayer:
    """One layer of an Offload. It can run once the last layer of the model has been added.

    Args:
        offload: the model's Offload, which must live as long as one of its layers.
        accelerator: the device that has the activations.
        number: the layer's number in the model.
        name: the layer's name in the model, for error messages.
        experts: the layer's experts.
        topk: experts per token.
        routed: experts that the router chooses from. It is more than `experts.num_experts` if other
            ranks hold some of them.
    """

    # Offload sets these once all layers of the model have been added.
    call: HybridCall
    ring: StagingRing | None = None
    threshold: int = 0
    """Batches of at least this many tokens are streamed; 0: none is."""
    rates: Rates | None = None
    """Divide streamed batches between the CPU and the device; None: they are the device's."""
    counters: StreamedCounters | None = None
    cache: CachedLayer | None = None
    """Has some of the experts on the device."""

    def __init__(
        self,
        offload: object,
        accelerator: Accelerator,
        number: int,
        name: str,
        experts: ExpertLayer,
        topk: int,
        routed: int,
    ) -> None:
        self.offload, self.accelerator = offload, accelerator
        self.number, self.name = number, name
        self.experts, self.topk, self.routed = experts, topk, routed
        operator.register(experts, self)

    def size(self) -> int:
        """Return the bytes of the layer's experts."""
        return sum(tensor.nbytes for tensor in self.experts.tensors.values())

    def run(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute x [M, H], topk_ids and topk_weights [M, k] on the device -> [M, H] as x.

        Raises RuntimeError if an earlier host call in any stream met an error.
        """
        cache, rest = self.cache, topk_ids
        if cache is not None:
            rest = cache.split(topk_ids)
            if _concentrated:  # The memory of both is measured.
                rest = topk_ids
        capturing = self.accelerator.capturing()
        streams = choose_path(len(x), capturing, self.threshold) is ComputePath.STREAMED
        if streams:
            out = self._run_streamed(x, rest, topk_weights)
        else:
            out = self._run_hybrid(x, rest, topk_weights, capturing)
        if cache is not None:
            cache.add(x, topk_ids, topk_weights, out, count=not streams)
        if not capturing:
            raise_host_call_error()
        return out

    def count(self, counters: StreamedCounters) -> None:
        """From now on, count the streamed batches."""
        assert self.ring is not None, "only layers with a ring are streamed"
        self.counters = counters
        self.ring.count(self.number, counters)

    def _run_hybrid(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        capturing: bool,
    ) -> torch.Tensor:
        """Compute a batch with lk."""
        reason = Reason.SMALL if self.threshold else Reason.OFF
        return self.call(x, topk_ids, topk_weights, reason=Reason.GRAPH if capturing else reason)

    def _run_streamed(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute a batch on the device from the ring's copies of experts, or some of it on lk."""
        ring = self.ring
        assert ring is not None, "a threshold is set together with a ring"
        if _concentrated:
            ids = torch.arange(topk_ids.shape[1], device=x.device, dtype=topk_ids.dtype)
            topk_ids = ids.where(ids < self.experts.num_experts, -1).expand_as(topk_ids)
        count = self.counters.add_batch if self.counters is not None else None
        batch = x, topk_ids, topk_weights
        try:
            if self.rates is None or _concentrated:
                return streamed.run(self.experts, ring, self.number, *batch, count=count)
            call, rates = self.call, self.rates
            return shared.run(self.experts, ring, self.number, call, rates, *batch, count=count)
        except BaseException:
            ring.abort()
            raise


_concentrated = False


@contextmanager
def concentrated_routing() -> Iterator[None]:
    """Route all tokens of streamed batches to the same experts while the context is open.

    vLLM measures a step's memory in this context. One group of experts that gets all tokens takes
    two to three times as much memory as tokens that are spread over all groups.
    """
    global _concentrated
    _concentrated = True
    try:
        yield
    finally:
        _concentrated = False
