"""Where the experts of a loaded model are."""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from lvllm.log import logger

__all__ = ["warn_if_none_are_ours"]


def warn_if_none_are_ours(vllm_config: Any, model: torch.nn.Module) -> None:
    """Warn in one line if `model`, which has experts, computes all of them by itself.

    Some models do, such as JetMoE in vLLM's Transformers backend. A stage of a pipeline may have
    no experts, so nothing is said there.
    """
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return
    if not any(isinstance(module, RoutedExperts) for module in model.modules()):
        logger.warning(
            "LvLLM: no experts of %s run on lk, because its class %s computes them by itself, and"
            " not in vLLM's layers of experts",
            vllm_config.model_config.model,
            type(model).__name__,
        )
