"""Routing that vLLM's CPU platform lacks: sigmoid scores, or a correction bias, without groups."""

from typing import Any

__all__ = ["register"]


def register() -> None:
    """Route ungrouped experts as a single group of all, which chooses and weighs the same.

    vLLM 0.32's CPU router stops at an assertion for sigmoid scores without groups (MiniMax-M2,
    Step-3.5), and leaves out a softmax's correction bias without a word (ERNIE-4.5).
    """
    try:
        from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    except ImportError:  # an older vLLM, whose CPU platform has the routers of all others
        return
    upstream = CPURouter.__init__
    if upstream.__module__ == __name__:
        return

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        upstream(self, *args, **kwargs)
        biased = self.e_score_correction_bias is not None
        plain = not self.use_grouped_topk and self.custom_routing_function is None
        if plain and (
            self.scoring_func == "sigmoid" or (self.scoring_func == "softmax" and biased)
        ):
            self.use_grouped_topk, self.num_expert_group, self.topk_group = True, 1, 1
            if not biased:
                self.routed_scaling_factor = 1.0  # as in vLLM's router for these on GPUs

    CPURouter.__init__ = __init__
