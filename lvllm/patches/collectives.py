"""What data parallelism of experts needs and vLLM 0.32 lacks on the CPU.

Its replicas divide the experts among them: a step's tokens of all replicas are gathered before the
experts and the sums scattered after them, however many each replica has. vLLM asks its CPU
communicator for both and gets NotImplementedError. A replica without requests takes part with a
dummy step, whose attention must give numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

__all__ = ["all_gatherv", "reduce_scatterv", "register"]


def register() -> None:
    """Give both collectives to the communicator of vLLM's CPU platform, unless it has them, and
    numbers to dummy steps.
    """
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    def gather(self: Any, input_: Any, dim: int = 0, sizes: Sequence[int] | None = None) -> Any:
        inputs = input_ if isinstance(input_, list) else [input_]
        each = _sizes(dim, sizes, [len(inputs[0])] * self.world_size)
        outputs = [all_gatherv(one, each, self.device_group) for one in inputs]
        return outputs if isinstance(input_, list) else outputs[0]

    def scatter(
        self: Any, input_: Tensor, dim: int = -1, sizes: Sequence[int] | None = None
    ) -> Tensor:
        each = _sizes(dim, sizes, [len(input_) // self.world_size] * self.world_size)
        return reduce_scatterv(input_, each, self.device_group)

    for name, function in (("all_gatherv", gather), ("reduce_scatterv", scatter)):
        if name not in vars(CpuCommunicator):
            setattr(CpuCommunicator, name, function)

    select = MoERunner._select_forward
    if select.__module__ == __name__:
        return

    def _select_forward(self: Any) -> Any:
        if not self.do_naive_dispatch_combine:
            return select(self)
        # On the CPU vLLM lets torch.compile see into the layer, and drops what the trace relied on:
        # the sizes of the first step would stand for all. These are its operators for GPUs.
        alone = self._shared_experts is None
        return torch.ops.vllm.moe_forward if alone else torch.ops.vllm.moe_forward_shared

    MoERunner._select_forward = _select_forward  # type: ignore[method-assign]
    _clear_dummy_attention()


def _clear_dummy_attention() -> None:
    """In a step without requests vLLM's attention for CPUs leaves its output as it was allocated,
    where those for GPUs write zeros. Its rows go through all replicas' experts, where the watch
    takes the NaN of a freed tensor for a fault: the server ended within seconds.
    """
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    upstream: Any = CPUAttentionBackendImpl.forward

    def forward(
        self: Any,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *more: Any,
        **options: Any,
    ) -> Tensor:
        if attn_metadata is None:
            return output.zero_()
        inputs = (layer, query, key, value, kv_cache, attn_metadata)
        attended: Tensor = upstream(self, *inputs, output, *more, **options)
        return attended

    CPUAttentionBackendImpl.forward = forward  # type: ignore[method-assign]


def _sizes(dim: int, sizes: Sequence[int] | None, equal: Sequence[int]) -> Sequence[int]:
    if dim != 0:
        raise NotImplementedError(f"rows are gathered and scattered along dimension 0, not {dim}")
    return sizes or equal


def all_gatherv(mine: Tensor, sizes: Sequence[int], group: Any) -> Tensor:
    """All ranks' rows, one rank after the other: [sizes[rank], ...] -> [sum(sizes), ...].

    gloo gathers tensors of one size only: shorter ones are padded on the way.
    """
    most = max(sizes)
    padded = mine.contiguous()
    if len(mine) < most:
        padded = mine.new_zeros(most, *mine.shape[1:])
        padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatterv(all_rows: Tensor, sizes: Sequence[int], group: Any) -> Tensor:
    """The sum over all ranks of this rank's rows: [sum(sizes), ...] -> [sizes[rank], ...]."""
    rank = torch.distributed.get_rank(group)
    parts = list(all_rows.contiguous().split(list(sizes)))
    out = torch.empty_like(parts[rank])
    torch.distributed.reduce_scatter(out, parts, group=group)
    return out
