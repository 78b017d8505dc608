"""The models of the predictions: sizes from benchmarks/plans, in int4 or in bf16."""

from functools import cache

import torch

from benchmarks.plans.models import AWQ, MODELS
from lvllm.gpu.groups import LayerWeights
from lvllm.planning import shape
from lvllm.planning.machine import Machine
from lvllm.planning.placement import USABLE, Load, Memory, Placement, memory
from lvllm.planning.shape import LayerShape, ModelShape

__all__ = [
    "CHUNK",
    "SHAPES",
    "host_tensors",
    "model",
    "needs",
    "resident_that_fit",
    "slots_share",
]

CHUNK = 8192
"""Tokens of a prompt that are computed at once."""
SHAPES = {
    "Qwen3-30B-A3B": "Qwen3-30B-A3B",
    "GLM-4.5-Air": "GLM-4.5-Air-FP8",
    "Qwen3-235B-A22B": "Qwen3-235B-A22B-FP8",
    "DeepSeek-V3": "DeepSeek-V3-AWQ",
}
"""The models, and the entries of benchmarks/plans/models.py that have their sizes."""


@cache
def model(name: str, format: str) -> ModelShape:
    """The shape of a model whose weights are all in `format`: int4 in groups of 128, or bf16."""
    config = next(one.config for one in MODELS if one.name == SHAPES[name])
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return shape.of_config(plain | ({"quantization_config": AWQ} if format == "int4" else {}), name)


def needs(model: ModelShape, machine: Machine, load: Load, resident: int = 0) -> Memory:
    """What the model takes of the machine's memory with so many resident layers."""
    return memory(model, machine, Placement(True, resident=resident, streamed_from=1), load)


def resident_that_fit(model: ModelShape, machine: Machine, load: Load) -> int:
    """How many layers' experts fit on the cards beside all else."""
    counts = range(1, len(model.moe_layers) + 1)
    return sum(needs(model, machine, load, count).card_lacks is None for count in counts)


def slots_share(model: ModelShape, machine: Machine, load: Load) -> float:
    """The share of all experts for which the cards have room, if none of their layers is whole."""
    assert machine.gpu, "all machines here have a GPU"
    free = USABLE * machine.gpu.memory_bytes - sum(needs(model, machine, load).card.values())
    return max(0.0, machine.gpus * free / (model.routed * model.bits.experts / 8))


def host_tensors(layer: LayerShape, bits: float, cards: int) -> LayerWeights:
    """One card's part of a layer's experts, as the engine has them."""
    stored = 16 if bits >= 16 else int(bits)
    sizes = {}
    for name, weights in (("w13", layer.expert * 2 // 3), ("w2", layer.expert // 3)):
        sizes[name] = weights * stored // 8 // cards
        if bits > stored:
            sizes[f"{name}_scale"] = int(weights * (bits - stored) / 8) // cards
    return {name: _untouched(layer.experts, size) for name, size in sizes.items()}


@cache
def _untouched(experts: int, size: int) -> torch.Tensor:
    """A tensor whose memory is never touched, so it takes addresses and no memory.

    All layers share it: one layer may have gigabytes, and Linux does not grant any sum of them.
    """
    return torch.empty((experts, size), dtype=torch.uint8)
