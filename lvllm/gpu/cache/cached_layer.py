"""One layer of a cache: divides each batch between the experts that have slots and all others."""

import torch

from lvllm.engine.expert_layer import ExpertLayer
from lvllm.gpu.accelerator import Accelerator, Event, Stream
from lvllm.gpu.cache import products
from lvllm.gpu.cache.slots import Slots
from lvllm.gpu.ids import without
from lvllm.gpu.pairs import Pairs
from lvllm.gpu.products import prepare

__all__ = ["CachedLayer"]


class CachedLayer:
    """The experts of a layer that have slots.

    The caller asks `split` for the ids that others compute, puts that work in its stream, and then
    calls `add`. Both run side by side on the device, since `add` computes in a stream of its own.
    All of this may be captured in a graph, whose replays read the table of slots.

    Args:
        accelerator: the device with the slots.
        experts: the layer's experts on the host; their memory is not read here.
        slots: the slots of all layers.
        table: int32 [E] on the device, the slot of each expert of this layer, or -1.
        reads: int32 [E] on the device, to which the batches are added that read each expert.
        stream: computes what has slots. All layers share it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        experts: ExpertLayer,
        slots: Slots,
        table: torch.Tensor,
        reads: torch.Tensor,
        stream: Stream,
    ) -> None:
        self._accelerator, self._experts, self._slots = accelerator, experts, slots
        self._table, self._reads, self._stream = table, reads, stream
        self._given: Event | None = None
        prepare(experts, accelerator.device)

    def split(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Return topk_ids [M, k] as int32, with -1 in the place of experts that have slots."""
        rest = without(topk_ids, self._table)
        self._given = self._accelerator.event()
        self._accelerator.record(self._given, self._accelerator.compute())
        return rest

    def add(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        out: torch.Tensor,
        *,
        count: bool,
    ) -> None:
        """Add the results of experts that have slots to those of all others.

        Args:
            x: [M, H].
            topk_ids: [M, k], all ids of the batch that `split` was called with last.
            topk_weights: float32 [M, k].
            out: [M, H] as x, what others computed. The sum is rounded to its dtype once more.
            count: whether the batch's reads are counted, of all experts.
        """
        accelerator = self._accelerator
        assert self._given is not None, "split comes first"
        accelerator.wait(self._given, self._stream)
        with accelerator.within(self._stream):
            pairs = Pairs.sort(topk_ids, topk_weights, self._experts.num_experts)
            if count:
                self._reads += pairs.starts_on_device.diff() > 0
            total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
            tensors = self._slots.tensors
            products.multiply(self._experts, tensors, self._table, x, pairs, total)
        computed = accelerator.event()
        accelerator.record(computed, self._stream)
        accelerator.wait(computed, accelerator.compute())
        # The stream's next work waits for the next batch's ids, and so for this. Only then does it
        # reuse the memory of `total`.
        out += total
