"""One layer whose experts are all in a device's memory, in the engine's order and format."""

import torch

from lvllm.engine.expert_layer import ExpertLayer
from lvllm.gpu import operator
from lvllm.gpu.accelerator import Accelerator
from lvllm.gpu.cache import products
from lvllm.gpu.pairs import Pairs
from lvllm.gpu.products import prepare, require_whole_words

__all__ = ["ResidentLayer"]


class ResidentLayer:
    """The experts of a layer, copied to a device.

    A batch is computed as one that finds all of its experts in a cache, so that a graph can hold
    it.

    Args:
        accelerator: the device.
        experts: the layer on the host. It is ended, and its memory freed.

    Raises:
        ValueError: in one line, if a graph could not hold the layer.
        MemoryError: in one line, if the device has no room.
    """

    def __init__(self, accelerator: Accelerator, experts: ExpertLayer) -> None:
        require_whole_words(experts, accelerator.device)
        stream = accelerator.compute()
        self._experts = experts
        self._tensors = {}
        for name, tensor in experts.tensors.items():
            memory = accelerator.device_memory(tensor.nbytes, stream)
            copied = memory.view(tensor.dtype).view(tensor.shape)
            self._tensors[name] = copied.copy_(tensor)
        self._slots = torch.arange(
            experts.num_experts, dtype=torch.int32, device=accelerator.device
        )
        prepare(experts, accelerator.device)
        operator.register(experts, self)
        experts.drop()

    def run(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute x [M, H], topk_ids and topk_weights [M, k] on the device -> [M, H] as x.

        An id of -1 skips the slot. Sums over k are in float32.
        """
        pairs = Pairs.sort(topk_ids, topk_weights, self._experts.num_experts)
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        products.multiply(self._experts, self._tensors, self._slots, x.contiguous(), pairs, total)
        return total.to(x.dtype)
