"""lk itself."""

from __future__ import annotations

import os

# PyTorch's own threads must sleep while the engine is timed; read when OpenMP is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from typing import Any

import torch

from benchmarks.cases import Batch
from benchmarks.peers.settings import Refused, Settings
from benchmarks.weights import FORMATS, GROUP_SIZE, RandomWeights
from lvllm import engine
from lvllm.engine import bank

PACKAGE = ""
__all__ = ["FORMATS", "PACKAGE", "prepare", "run", "version"]


def version() -> str:
    return engine.info().isa


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, parts: int) -> torch.Tensor:
    if len(shape) < 2:
        return torch.empty(shape, dtype=dtype)
    return bank.allocate(shape, dtype, parts=parts)


def prepare(weights: RandomWeights, settings: Settings) -> engine.ExpertLayer:
    engine.configure(threads=settings.threads)
    options: dict[str, Any] = {"format": weights.format}
    if weights.format == "int4":
        options["group_size"] = GROUP_SIZE
    if settings.activation_bits is not None:
        options["activation_bits"] = settings.activation_bits
    try:
        return engine.ExpertLayer(**options | weights.tensors(_allocate))
    except (ValueError, MemoryError) as error:
        raise Refused(str(error)) from None


def run(layer: engine.ExpertLayer, batch: Batch) -> torch.Tensor:
    return layer(batch.x, batch.ids, batch.weights)
