"""AMD's zentorch: `zentorch_fused_moe`. It reorders weights in place at the first call."""

from __future__ import annotations

import importlib.metadata

import torch

from benchmarks.cases import Batch
from benchmarks.peers.settings import Settings
from benchmarks.weights import RandomWeights

PACKAGE = "zentorch"
FORMATS = ("bf16", "int8", "int4")


def version() -> str:
    import zentorch  # type: ignore[import-not-found]  # noqa: F401  registers torch.ops.zentorch

    return importlib.metadata.version("zentorch")


def _int4(weight: torch.Tensor) -> torch.Tensor:
    """[E, N, K/8] int32 of signed nibbles."""
    repack = torch.ops.zentorch.zentorch_woq_repack_weight.default
    return torch.stack(
        [
            repack((torch.stack((rows & 15, rows >> 4), -1).flatten(-2).int() - 8).to(torch.int8))
            for rows in weight
        ]
    )


def prepare(weights: RandomWeights, settings: Settings) -> dict[str, torch.Tensor]:
    tensors = weights.tensors()
    if weights.format == "int4":
        for name in ("w13", "w2"):
            tensors[name] = _int4(tensors[name])
            scale = tensors[name + "_scale"]
            tensors[name + "_scale"] = scale.transpose(1, 2).contiguous()  # [E, K/g, N]
    return tensors


def run(layer: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    out = torch.empty_like(batch.x)
    torch.ops.zentorch.zentorch_fused_moe(
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
        layer.get("w13_scale"),
        layer.get("w2_scale"),
    )
    return out
