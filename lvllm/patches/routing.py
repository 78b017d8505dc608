"""Routing that vLLM's CPU platform lacks: sigmoid scores, correction biases, zero experts."""

from importlib.util import find_spec
from typing import Any

from lvllm.patches.registry import Unless, patch

__all__ = ["route_in_one_group", "route_to_zero_experts"]


def _has_no_router() -> bool:
    return find_spec("vllm.model_executor.layers.fused_moe.router.cpu_router") is None


@patch(
    "vllm.model_executor.layers.fused_moe.router.cpu_router:CPURouter.__init__",
    signature="(self, top_k, global_num_experts, use_grouped_topk=False, num_expert_group=None,"
    " topk_group=None, renormalize=True, scoring_func='softmax', routed_scaling_factor=1.0,"
    " e_score_correction_bias=None, custom_routing_function=None, hash_indices_table=None,"
    " eplb_state=None)",
    why="vLLM's CPU router stops at an assertion for sigmoid scores without groups (MiniMax-M2,"
    " Step-3.5), and leaves out a softmax's correction bias without a word (ERNIE-4.5). A single"
    " group of all experts chooses and weighs the same.",
    upstream="none, because nothing was proposed yet",
    until="CPURouter takes sigmoid scores and a correction bias without groups",
    platform="cpu",
    unless=Unless(
        "vLLM, before 0.30, has no CPURouter and routes on CPUs as on all others", _has_no_router
    ),
)
def route_in_one_group(original: Any) -> Any:
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        biased = self.e_score_correction_bias is not None
        plain = not self.use_grouped_topk and self.custom_routing_function is None
        if plain and (
            self.scoring_func == "sigmoid" or (self.scoring_func == "softmax" and biased)
        ):
            self.use_grouped_topk, self.num_expert_group, self.topk_group = True, 1, 1
            if not biased:
                self.routed_scaling_factor = 1.0  # as in vLLM's router for these on GPUs

    return __init__


@patch(
    "vllm.model_executor.layers.fused_moe.router.zero_expert_router:ZeroExpertRouter"
    "._compute_routing",
    signature="(self, hidden_states, router_logits, indices_type, *, input_ids=None)",
    why="vLLM routes LongCat-Flash and computes its zero-computation experts, which return their"
    " input, with kernels for GPUs only. PyTorch does the same.",
    upstream="none, because nothing was proposed yet",
    until="ZeroExpertRouter runs on CPUs",
    platform="cpu",
)
def route_to_zero_experts(original: Any) -> Any:
    from vllm.model_executor.layers.fused_moe.router.cpu_router import _grouped_topk

    def _compute_routing(
        self: Any,
        hidden_states: Any,
        router_logits: Any,
        indices_type: Any,
        *,
        input_ids: Any = None,
    ) -> Any:
        weights, ids = _grouped_topk(
            router_logits,
            topk=self.top_k,
            renormalize=self.renormalize,
            num_expert_group=1,
            topk_group=1,
            scoring_func=self.scoring_func,
            routed_scaling_factor=self.routed_scaling_factor,
            e_score_correction_bias=self.e_score_correction_bias,
        )
        zero = ids >= self.num_logical_experts
        factor = weights.masked_fill(~zero, 0).sum(dim=-1, keepdim=True)
        # vLLM adds this to the sum of the other experts.
        self._zero_expert_output = (hidden_states * factor).to(hidden_states.dtype)
        # As vLLM does, for its kernels on CPUs compute wrong values for the id -1.
        ids = ids.masked_fill(zero, 0).to(indices_type or ids.dtype)
        return weights.masked_fill(zero, 0), ids

    return _compute_routing
