"""vLLM's own options that quantise a model while it is loaded: `--quantization fp8_per_channel`.

vLLM calls this online quantisation. What it asks for experts, LvLLM does as `LVLLM_MOE_USE_WEIGHT`
would. Linear layers are vLLM's, which has few kernels for them on CPUs.
"""

from typing import Any

from lvllm.settings.configuration import Accelerator
from lvllm.settings.use_weight import UseWeight
from lvllm.settings.variables import SettingError

__all__ = ["check_linear_layers", "experts", "is_all"]

NAME = "online"
"""What vLLM calls its configuration of all of these schemes."""

EXPERTS = {
    "fp8_per_tensor_static": UseWeight.FP8,
    "fp8_per_block_static": UseWeight.FP8,
    "fp8_per_channel_static": UseWeight.FP8,
    "int8_per_channel_static": UseWeight.INT8,
    "int4_per_group_32": UseWeight.INT4,
}
"""vLLM's names of weights, and the formats in which LvLLM computes such experts. Where vLLM has a
scale for a tensor or a block, LvLLM has one for each row."""

LINEAR_ON_CPU = ("fp8_per_channel_static",)
"""The weights of linear layers that vLLM quantises and multiplies on any CPU. Its fp8_per_tensor
lacks an operator there, and its fp8_per_block needs AMX."""

ALLOWED = "allowed are --quantization {}; LVLLM_MOE_USE_WEIGHT=FP8, INT8 or INT4 quantises experts"
EVERYWHERE = "fp8, fp8_per_tensor, fp8_per_block, fp8_per_channel and int8_per_channel_weight_only"
ON_CPU = "fp8_per_channel and int8_per_channel_weight_only"


def is_all(vllm_config: Any) -> bool:
    """Whether the checkpoint is not quantised, and vLLM's options quantise it."""
    config = vllm_config.quant_config
    return config is not None and config.get_name() == NAME


def experts(vllm_config: Any) -> UseWeight | None:
    """The format to which vLLM's options quantise experts while loading; None: to none.

    Raises SettingError for a scheme that LvLLM does not compute.
    """
    config = vllm_config.quant_config
    # Options may also quantise what a quantised checkpoint has left as it was.
    online = getattr(config, "online_quantization_config", None) or config
    if online is None or online.get_name() != NAME:
        return None
    if online.args.targets is not None or (online.args.moe is not None and online.args.ignore):
        raise SettingError(
            "quantization-config with targets or ignore does not say which experts LvLLM is to"
            " quantise: say so in LVLLM_MOE_USE_WEIGHT, which takes rules for layers, or KEEP"
        )
    wanted = online.args.moe
    if wanted is None or wanted.weight is None:
        return None
    found = EXPERTS.get(str(wanted)) if wanted.activation is None else None
    if found is None:
        raise _refusal(vllm_config, "LvLLM quantises no experts in this way", EVERYWHERE)
    return found


def check_linear_layers(vllm_config: Any, accelerator: Accelerator) -> None:
    """Raise SettingError for linear layers that vLLM would not quantise on this platform."""
    if accelerator == "cuda" or not is_all(vllm_config):
        return
    wanted = vllm_config.quant_config.args.linear
    if wanted is not None and wanted.weight is not None and str(wanted) not in LINEAR_ON_CPU:
        raise _refusal(
            vllm_config, f"vLLM has no kernel for linear layers in {wanted} on CPUs", ON_CPU
        )


def _refusal(vllm_config: Any, why: str, allowed: str) -> SettingError:
    written = vllm_config.model_config.quantization
    return SettingError(f"quantization={written!r}: {why}; {ALLOWED.format(allowed)} alone")
