"""A layer of experts in float32, by plain PyTorch."""

import torch

from lvllm.engine import ExpertLayer
from lvllm.engine.activations import activate
from lvllm.verifying.stored import bias, matrix

__all__ = ["expert_block"]


def expert_block(
    layer: ExpertLayer, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> torch.Tensor:
    """What `layer(x, topk_ids, topk_weights)` is to compute: [M, H] float32."""
    x = x.float()
    out = torch.zeros_like(x)
    for expert in topk_ids.unique().tolist():
        if expert < 0:
            continue
        rows, places = (topk_ids == expert).nonzero(as_tuple=True)
        weights = topk_weights[rows, places].float().unsqueeze(1)
        on_input = layer.apply_router_weight_on_input
        taken = x[rows] * weights if on_input else x[rows]
        inner = taken @ matrix(layer, "w13", expert).T + bias(layer, "w13", expert)
        outer = activate(layer, inner) @ matrix(layer, "w2", expert).T + bias(layer, "w2", expert)
        out.index_add_(0, rows, outer if on_input else outer * weights)
    return out
