"""Which rows of a batch are padding, where replicas exchange their tokens.

vLLM pads a batch to a size for which it has captured a graph, and gives a replica without requests
a batch of padding alone. The forward context says which rows these are, so that routers give them
no expert. With data parallelism the rows of all replicas are gathered before the routing, but the
mask is not.
"""

from typing import Any

import torch
from torch import Tensor

from lvllm.patches.registry import patch

__all__ = ["gather_padding", "restore_padding"]

UPSTREAM = "none, because nothing was proposed yet"
UNTIL = "MoERunner gathers the mask together with the tokens"
OWN = "lvllm_own_padding"
"""The entry of the context's additional_kwargs that keeps this rank's mask meanwhile."""


@patch(
    "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner._maybe_dispatch",
    signature="(self, hidden_states, router_logits)",
    why="With data parallelism vLLM applies the mask of one replica's rows to those of all: its"
    " routers read beyond the mask's end, and tokens may lose their experts. The mask travels as a"
    " column of the router's logits. Where it cannot, there is none, and padding is computed.",
    upstream=UPSTREAM,
    until=UNTIL,
)
def gather_padding(original: Any) -> Any:
    def _maybe_dispatch(self: Any, hidden_states: Tensor, router_logits: Tensor) -> Any:
        if not self.do_naive_dispatch_combine:
            return original(self, hidden_states, router_logits)
        from vllm.forward_context import get_forward_context

        context = get_forward_context()
        own = context.is_padding
        context.additional_kwargs[OWN] = own
        # With sequence parallelism a rank has a part of the rows, and the mask is that of all. On
        # one rank alone both may be as long, but all ranks have to gather as many columns.
        if own is None or self.moe_config.is_sequence_parallel:
            context.is_padding = None
            return original(self, hidden_states, router_logits)
        column = own.to(router_logits.dtype).unsqueeze(1)
        hidden_states, both = original(self, hidden_states, torch.cat((router_logits, column), 1))
        context.is_padding = both[:, -1] != 0
        return hidden_states, both[:, :-1].contiguous()

    return _maybe_dispatch


@patch(
    "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner._maybe_combine",
    signature="(self, shared_output, hidden_states)",
    why="The next layer gathers this rank's mask again, so the context gets it back.",
    upstream=UPSTREAM,
    until=UNTIL,
)
def restore_padding(original: Any) -> Any:
    def _maybe_combine(self: Any, shared_output: Tensor | None, hidden_states: Any) -> Any:
        if self.do_naive_dispatch_combine:
            from vllm.forward_context import get_forward_context

            context = get_forward_context()
            context.is_padding = context.additional_kwargs.pop(OWN)
        return original(self, shared_output, hidden_states)

    return _maybe_combine
