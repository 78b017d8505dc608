"""Experts of NVIDIA ModelOpt checkpoints: fp8 with one scale a projection, and nvfp4."""

from typing import Any

from vllm.model_executor.layers.quantization.modelopt import (
    ModelOptFp8Config,
    ModelOptNvFp4Config,
)

from lvllm.formats.base import ExpertFormat
from lvllm.formats.fp4 import Nvfp4
from lvllm.formats.fp8 import Fp8
from lvllm.formats.unquantized import Unquantized

__all__ = ["find"]


def find(quant_config: Any, layer: Any, prefix: str) -> ExpertFormat | None:
    """Experts of a ModelOpt checkpoint; those that it leaves alone are plain."""
    if not isinstance(quant_config, ModelOptFp8Config | ModelOptNvFp4Config):
        return None
    modules = (prefix, f"{prefix}.0.{layer.ckpt_down_proj_name}")
    if any(quant_config.is_layer_excluded(module) for module in modules):
        return Unquantized()
    algorithm = quant_config.quant_method
    if algorithm == "FP8":
        return Fp8("tensor", "weight_scale", static_inputs=True)
    if algorithm in ("NVFP4", "W4A16_NVFP4"):
        inputs = "input_scale" if algorithm == "NVFP4" else None
        return Nvfp4("weight", "weight_scale_2", divides=False, input_scale=inputs)
    raise ValueError(
        f"{prefix}: quant_algo is {algorithm}; supported are FP8, NVFP4 and W4A16_NVFP4"
    )
