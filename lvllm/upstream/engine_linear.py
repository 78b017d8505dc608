"""Linear layers on the engine: attention's projections, shared experts, the router and the head.

On a CPU they take longer than the experts do, because every token reads all of their weights. vLLM
multiplies them with oneDNN, which has no fast bf16 for CPUs with AVX2 only. The engine multiplies
them as fast as the experts, and with `LVLLM_DENSE_WEIGHT=INT8` it reads half as many bytes.
`lvllm.patches.kernels` asks `take` first.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from lvllm import startup
from lvllm.engine import OWN_FORMAT, LinearLayer
from lvllm.engine.weight_formats import preferred_activation_bits
from lvllm.settings.configuration import HybridConfig
from lvllm.settings.variables import DenseWeight

__all__ = ["take"]

LEAST_INT8_ROWS = 1024
"""Layers with fewer rows stay as they are. These are routers, whose small differences decide which
experts a token gets, and they are too small to matter for the speed."""

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def take(layer: Any, *, remove_weight: bool) -> bool:
    """Have the engine multiply `layer`, by setting its `cpu_linear`. Return whether it does.

    `remove_weight` says that nothing else reads the layer's weight.
    """
    config = HybridConfig.current_or_none()
    if config is None or config.dense_weight is None:
        return False
    if not isinstance(layer, LinearBase | VocabParallelEmbedding):
        return False
    weight = layer.weight
    if weight.dim() != 2 or weight.is_meta or weight.dtype not in OWN_FORMAT:
        return False
    if config.dense_weight == DenseWeight.KEEP and torch.cpu._is_amx_tile_supported():
        return False  # oneDNN multiplies bf16 with AMX, at several times the rate of vectors.
    startup.start_engine(startup.host_rank())
    if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
        # Some models use the embeddings as their head, which shows in the first call only.
        layer.cpu_linear = _at_first_use(weight, config)
        return True
    layer.cpu_linear = _linear(weight, config)
    if remove_weight:
        empty = torch.empty(0, dtype=weight.dtype)
        layer.weight = torch.nn.Parameter(empty, requires_grad=False)
    return True


def _linear(weight: torch.Tensor, config: HybridConfig) -> Linear:
    int8 = config.dense_weight == DenseWeight.INT8 and len(weight) >= LEAST_INT8_ROWS
    layer = LinearLayer(
        weight.detach(),
        format="int8" if int8 else OWN_FORMAT[weight.dtype],
        activation_bits=preferred_activation_bits("int8", config.activation_bits) if int8 else None,
    )

    def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = layer(x)
        return y if bias is None else y + bias

    return multiply


def _at_first_use(weight: torch.Tensor, config: HybridConfig) -> Linear:
    made: list[Linear] = []

    def multiply(
        x: torch.Tensor, weight_now: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if not made:
            made.append(_linear(weight, config))
        return made[0](x, weight_now, bias)

    return multiply
