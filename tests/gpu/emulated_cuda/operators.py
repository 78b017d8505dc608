"""Computes those of vLLM's own operators for CUDA that a small MoE model uses."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.gpu.emulated_cuda import routers
from tests.gpu.emulated_cuda.operations import enqueue, to_host

__all__ = ["compute"]

_libraries: list[torch.library.Library] = []


def compute(_: Any) -> None:
    """Replace the operators, once `vllm._custom_ops` has loaded vLLM's libraries."""
    of_namespaces = {
        "_C": _by_name(rms_norm, fused_add_rms_norm, silu_and_mul, vocab_parallel_embedding),
        "_moe_C": {
            **_by_name(moe_align_block_size, moe_sum, routers.topk_softmax, routers.topk_sigmoid),
            "grouped_topk": _grouped_topk,  # It returns what the others are given to write.
        },
    }
    for namespace, operators in of_namespaces.items():
        library = torch.library.Library(namespace, "IMPL")
        for name, operator in operators.items():
            library.impl(name, operator, "CUDA", allow_override=True)
        _libraries.append(library)


def _by_name(*functions: Callable[..., None]) -> dict[str, Callable[..., Any]]:
    return {function.__name__: _on_host(function) for function in functions}


def _on_host(function: Callable[..., None]) -> Callable[..., None]:
    def run(*args: Any, **kwargs: Any) -> None:
        host = [to_host(one) for one in args], {k: to_host(v) for k, v in kwargs.items()}
        enqueue(lambda: function(*host[0], **host[1]))

    return run


def _grouped_topk(scores: Tensor, groups: int, kept: int, topk: int, *others: Any) -> Any:
    made = [
        torch.empty(len(scores), topk, dtype=dtype, device=scores.device)
        for dtype in (torch.float32, torch.int32)
    ]
    _on_host(routers.grouped_topk)(*made, scores, groups, kept, *others)
    return tuple(made)


def rms_norm(out: Tensor, x: Tensor, weight: Tensor | None, epsilon: float) -> None:
    out.copy_(_normalized(x.float(), weight, epsilon))


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float) -> None:
    total = x.float() + residual.float()
    residual.copy_(total)
    x.copy_(_normalized(total, weight, epsilon))


def _normalized(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    made = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return made if weight is None else made * weight.float()


def silu_and_mul(out: Tensor, x: Tensor) -> None:
    gate, up = x.float().chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def vocab_parallel_embedding(
    out: Tensor, ids: Tensor, weight: Tensor, begin: int, end: int, *others: int
) -> None:
    """Take this rank's rows, of words `begin` to `end`, and zeros for others. None was added."""
    own = (ids >= begin) & (ids < end)
    rows = weight[(ids.long() - begin).clamp(0, len(weight) - 1)]
    out.copy_(rows * own.unsqueeze(-1))


def moe_align_block_size(
    ids: Tensor,
    experts: int,
    block: int,
    order: Tensor,
    owners: Tensor,
    total: Tensor,
    *others: Any,
) -> None:
    """Order pairs by their experts, each of which begins a new block."""
    flat, at = ids.flatten(), 0
    order.fill_(flat.numel())
    owners.fill_(-1)
    for expert in range(experts):
        own = (flat == expert).nonzero().flatten().to(order.dtype)
        end = at + -(-len(own) // block) * block
        order[at : at + len(own)] = own
        owners[at // block : end // block] = expert
        at = end
    total.fill_(at)


def moe_sum(x: Tensor, out: Tensor, *others: Any) -> None:
    out.copy_(x.float().sum(1))
