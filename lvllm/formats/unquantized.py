"""bfloat16 and float16 experts: the checkpoint's bytes, in the checkpoint's order."""

from typing import Any

import torch
from torch.nn import Module, Parameter

from lvllm import bank
from lvllm.engine import ExpertLayer

__all__ = ["create_weights", "finalize", "matches"]


def matches(quant_config: Any, prefix: str) -> bool:
    """Whether the layer called `prefix` holds plain bfloat16 or float16 experts."""
    return quant_config is None


def create_weights(
    layer: Module,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    attributes: dict[str, Any],
) -> None:
    """Register `w13_weight` [E, 2I, H] (gate rows, then up rows) and `w2_weight` [E, H, I]."""
    for name, rows, columns, parts in (
        ("w13_weight", 2 * intermediate_size, hidden_size, 2),
        ("w2_weight", hidden_size, intermediate_size, 1),
    ):
        memory = bank.allocate((num_experts, rows, columns), dtype, parts=parts)
        parameter = Parameter(memory, requires_grad=False)
        for key, value in attributes.items():
            setattr(parameter, key, value)
        layer.register_parameter(name, parameter)


def finalize(layer: Any) -> ExpertLayer:
    """The engine's view of the loaded parameters."""
    return ExpertLayer(
        format={torch.bfloat16: "bf16", torch.float16: "fp16"}[layer.w13_weight.dtype],
        w13=layer.w13_weight.data,
        w2=layer.w2_weight.data,
        activation=layer.activation.value,
        apply_router_weight_on_input=layer.apply_router_weight_on_input,
    )
