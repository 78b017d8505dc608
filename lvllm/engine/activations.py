"""The activation functions of `ExpertLayer` in plain PyTorch, on any device."""

import torch
import torch.nn.functional as F

from lvllm.engine.expert_layer import ExpertLayer

__all__ = ["activate"]


def activate(layer: ExpertLayer, h: torch.Tensor) -> torch.Tensor:
    """Apply the activation, as `ExpertLayer` defines it, to float32 [P, gate and up] -> [P, I]."""
    if layer.activation == "relu2":
        return h.relu().square()
    gate, up = h.chunk(2, dim=1)
    alpha, beta, limit = layer.swiglu
    match layer.activation:
        case "silu":
            return F.silu(gate) * up
        case "gelu":
            return F.gelu(gate) * up
        case "gelu_tanh":
            return F.gelu(gate, approximate="tanh") * up
        case "swiglustep":
            return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + beta) * gate * torch.sigmoid(alpha * gate)
