"""Data parallelism of experts on the CPU, for which vLLM lacks two collectives.

Replicas divide the experts among them. Before the experts, the tokens that all replicas have in a
step are gathered; after the experts, the sums are scattered. Replicas may have different numbers of
tokens. vLLM asks its CPU communicator for both collectives and gets NotImplementedError. A replica
without requests takes part with a dummy step, whose attention must give numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from lvllm.patches.registry import Unless, patch

__all__ = [
    "add_all_gatherv",
    "add_reduce_scatterv",
    "all_gatherv",
    "clear_dummy_attention",
    "hide_experts_from_compilation",
    "reduce_scatterv",
]

UPSTREAM = (
    "https://github.com/vllm-project/vllm/issues/57837; draft:"
    " docs/upstream/cpu-expert-parallelism.md"
)


def _own(name: str) -> Unless:
    def has_its_own() -> bool:
        from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

        return name in vars(CpuCommunicator)

    return Unless(f"vLLM's CpuCommunicator has its own {name}", has_its_own)


@patch(
    "vllm.distributed.device_communicators.cpu_communicator:CpuCommunicator.all_gatherv",
    signature="(self, input_, dim=0, sizes=None)",
    why="vLLM's CPU communicator inherits an all_gatherv that raises NotImplementedError.",
    upstream=UPSTREAM,
    until="CpuCommunicator has its own all_gatherv",
    platform="cpu",
    unless=_own("all_gatherv"),
)
def add_all_gatherv(original: Any) -> Any:
    def gather(self: Any, input_: Any, dim: int = 0, sizes: Sequence[int] | None = None) -> Any:
        inputs = input_ if isinstance(input_, list) else [input_]
        each = _sizes(dim, sizes, [len(inputs[0])] * self.world_size)
        outputs = [all_gatherv(one, each, self.device_group) for one in inputs]
        return outputs if isinstance(input_, list) else outputs[0]

    return gather


@patch(
    "vllm.distributed.device_communicators.cpu_communicator:CpuCommunicator.reduce_scatterv",
    signature="(self, input_, dim=-1, sizes=None)",
    why="vLLM's CPU communicator inherits a reduce_scatterv that raises NotImplementedError.",
    upstream=UPSTREAM,
    until="CpuCommunicator has its own reduce_scatterv",
    platform="cpu",
    unless=_own("reduce_scatterv"),
)
def add_reduce_scatterv(original: Any) -> Any:
    def scatter(
        self: Any, input_: Tensor, dim: int = -1, sizes: Sequence[int] | None = None
    ) -> Tensor:
        each = _sizes(dim, sizes, [len(input_) // self.world_size] * self.world_size)
        return reduce_scatterv(input_, each, self.device_group)

    return scatter


@patch(
    "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner._select_forward",
    signature="(self)",
    why="On the CPU vLLM lets torch.compile trace into a layer of experts, and drops the guards of"
    " the trace. The numbers of tokens that the replicas had in the first step would stand for all"
    " steps. With data parallelism the layer runs behind vLLM's operators for GPUs instead.",
    upstream=UPSTREAM,
    until="vLLM's CPU platform uses these operators where replicas exchange tokens",
    platform="cpu",
)
def hide_experts_from_compilation(original: Any) -> Any:
    def _select_forward(self: Any) -> Any:
        if not self.do_naive_dispatch_combine:
            return original(self)
        alone = self._shared_experts is None
        return torch.ops.vllm.moe_forward if alone else torch.ops.vllm.moe_forward_shared

    return _select_forward


@patch(
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward",
    signature="(self, layer, query, key, value, kv_cache, attn_metadata, output,"
    " output_scale=None, output_block_scale=None)",
    why="In a step without requests vLLM's attention for CPUs leaves its output as it was"
    " allocated, where those for GPUs write zeros. The rows go through all replicas' experts,"
    " where the watch takes the NaN of freed memory for a fault. The server ended within seconds.",
    upstream=UPSTREAM,
    until="CPUAttentionBackendImpl.forward writes zeros without metadata",
    platform="cpu",
)
def clear_dummy_attention(original: Any) -> Any:
    def forward(
        self: Any,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *arguments: Any,
        **options: Any,
    ) -> Tensor:
        if attn_metadata is None:
            return output.zero_()
        inputs = (layer, query, key, value, kv_cache, attn_metadata)
        attended: Tensor = original(self, *inputs, output, *arguments, **options)
        return attended

    return forward


def _sizes(dim: int, sizes: Sequence[int] | None, equal: Sequence[int]) -> Sequence[int]:
    if dim != 0:
        raise NotImplementedError(f"rows are gathered and scattered along dimension 0, not {dim}")
    return sizes or equal


def all_gatherv(mine: Tensor, sizes: Sequence[int], group: Any) -> Tensor:
    """Return all ranks' rows, one rank after the other: [sizes[rank], ...] -> [sum(sizes), ...].

    gloo gathers tensors of one size only, so shorter ones are padded on the way.
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
    """Return the sum over ranks of this rank's rows: [sum(sizes), ...] -> [sizes[rank], ...]."""
    rank = torch.distributed.get_rank(group)
    parts = list(all_rows.contiguous().split(list(sizes)))
    out = torch.empty_like(parts[rank])
    torch.distributed.reduce_scatter(out, parts, group=group)
    return out
