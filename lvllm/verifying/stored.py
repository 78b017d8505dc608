"""The weights of an engine layer as plain matrices in float32."""

import torch

from lvllm.engine import ExpertLayer
from lvllm.gpu.convert import convert

__all__ = ["Matrix", "bias", "matrix"]

Matrix = str
"""The name of a matrix: "w13", gate rows and then up rows, or "w2"."""


def matrix(layer: ExpertLayer, name: Matrix, expert: int) -> torch.Tensor:
    """One expert's matrix, float32 [rows, columns], from the engine's own memory."""
    return convert(layer, layer.tensors, name, range(expert, expert + 1), torch.float32)[0]


def bias(layer: ExpertLayer, name: Matrix, expert: int) -> torch.Tensor | float:
    """One expert's biases, float32 [rows]; 0 if the layer has none."""
    biases = layer.tensors.get(f"{name}_bias")
    return 0.0 if biases is None else biases[expert]
