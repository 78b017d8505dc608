"""The operator that computes a layer's experts for activations that are on a device."""

import weakref
from typing import Protocol

import torch

from lvllm.engine.expert_layer import ExpertLayer

__all__ = ["Layer", "register"]


class Layer(Protocol):
    """A layer that the operator computes."""

    def run(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute x [M, H], topk_ids and topk_weights [M, k] on the device -> [M, H] as x."""
        ...


_layers: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
"""The layers of all models, by the engine's handle, which no later layer gets."""


def register(experts: ExpertLayer, layer: Layer) -> None:
    """Let the operator compute `layer` where it is given the handle of `experts`.

    The caller keeps the layer, which is forgotten at its end.
    """
    _layers[int(experts.handle)] = layer


@torch.library.custom_op("lvllm::routed_experts", mutates_args=())
def routed_experts(
    x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, layer: torch.Tensor
) -> torch.Tensor:
    """Run a layer on its device; `layer` is its `ExpertLayer.handle`.

    This is an operator so that torch.compile does not trace into the choice of a path.
    """
    return _layers[int(layer)].run(x, topk_ids, topk_weights)


@routed_experts.register_fake
def _routed_experts_fake(
    x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, layer: torch.Tensor
) -> torch.Tensor:
    return x.new_empty(x.shape)
