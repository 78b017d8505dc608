"""Experts of NVIDIA ModelOpt checkpoints: fp8 with one scale for a projection, and nvfp4."""

from typing import Any

from lvllm.formats.base import ExpertFormat
from lvllm.formats.descriptor import Descriptor, Section, Stored
from lvllm.formats.fp4 import Nvfp4
from lvllm.formats.fp8 import Fp8
from lvllm.formats.unquantized import Unquantized

__all__ = ["DESCRIPTOR", "find"]


def _stored(section: Section, module: str) -> Stored:
    # Older versions nest what newer ones have in the section itself.
    algorithm = section.get("quant_algo") or section.get("quantization", {}).get("quant_algo")
    return Stored(bits=4 if "FP4" in str(algorithm).upper() else 8)


DESCRIPTOR = Descriptor(
    "ModelOpt",
    stored=_stored,
    quantizations=("modelopt", "modelopt_fp4"),
    quant_methods=("modelopt", "modelopt_fp4"),
    exceptions=("ignore", "exclude_modules", "quantization.exclude_modules"),
    scales=("scale", "weight_scale_2"),
    input_scales=("input_scale",),
)


def find(quant_config: Any, layer: Any, prefix: str) -> ExpertFormat | None:
    """Experts of a ModelOpt checkpoint; those that it leaves alone are not quantised."""
    if not DESCRIPTOR.describes(quant_config):
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
