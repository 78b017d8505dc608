"""Plain PyTorch: a matrix product an expert, as Hugging Face's models do it.

Quantised weights would have to be dequantised first, which is no peer.
"""

from __future__ import annotations

import torch

from benchmarks.cases import Batch
from benchmarks.peers.settings import Settings
from benchmarks.weights import RandomWeights

PACKAGE = "torch"
FORMATS = ("bf16", "fp16")


def version() -> str:
    return str(torch.__version__)


def prepare(weights: RandomWeights, settings: Settings) -> dict[str, torch.Tensor]:
    return weights.tensors()


def run(layer: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    out = torch.zeros_like(batch.x)
    for expert in batch.ids.unique().tolist():
        token, slot = torch.where(batch.ids == expert)
        gate, up = torch.nn.functional.linear(batch.x[token], layer["w13"][expert]).chunk(2, -1)
        down = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, layer["w2"][expert])
        out.index_add_(0, token, down * batch.weights[token, slot, None].to(down.dtype))
    return out
