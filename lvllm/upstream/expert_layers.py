"""LvLLM's layers of experts in the place of vLLM's, through vLLM's seam for out-of-tree layers."""

from vllm.model_executor.custom_op import op_registry_oot

from lvllm.moe.routed_experts import REPLACED

__all__ = ["register"]


def register() -> None:
    """Register the classes by vLLM's names for them, unless that has been done.

    A subclass that is not named here is not replaced: `lvllm.patches.experts` refuses it.
    """
    for upstream, ours in REPLACED.items():
        if upstream.__name__ not in op_registry_oot:
            upstream.register_oot(ours)
