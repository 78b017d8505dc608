"""Configurations of quantised checkpoints, for variants that vLLM refuses and LvLLM computes.

They are registered under vLLM's own names through its public function. For every checkpoint that
vLLM takes, they behave like the classes they derive from.
"""

from copy import deepcopy
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.inc import INCConfig
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_linear_quant_method
from vllm.model_executor.layers.quantization.utils.marlin_utils import (
    check_marlin_supported,
    get_marlin_input_dtype,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from lvllm.checkpoint.gguf.architectures import METHOD
from lvllm.errors import LayerError
from lvllm.formats import gptq
from lvllm.formats.compressed_tensors import ORDERED
from lvllm.upstream.integer_linear import GptqLinear

__all__ = ["AutoRoundConfig", "CompressedConfig", "GgufConfig", "GptqConfig", "register"]


class GptqConfig(AutoGPTQConfig):
    """GPTQ with zero points (sym=false), act-order (desc_act=true) and 8 bits as well."""

    TYPE_MAP = AutoGPTQConfig.TYPE_MAP | {
        (4, False): scalar_types.uint4,
        (8, False): scalar_types.uint8,
    }

    def __init__(
        self,
        weight_bits: int,
        group_size: int,
        desc_act: bool,
        is_sym: bool,
        lm_head_quantized: bool,
        dynamic: dict[str, Any],
        *more: Any,
        **named: Any,
    ) -> None:
        # vLLM's own raises for act-order here, and where `dynamic` asks for it.
        super().__init__(
            weight_bits, group_size, False, is_sym, lm_head_quantized, {}, *more, **named
        )
        self.desc_act = desc_act and group_size != -1
        self.dynamic = dynamic

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:  # type: ignore[override]
        """Return a mapper that keeps g_idx, which vLLM's own drops."""
        return WeightsMapper() if self.desc_act else super().get_checkpoint_weight_mapper()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method of a linear layer or of resident experts.

        The method of other experts comes from `lvllm.formats`.
        """
        if not isinstance(layer, RoutedExperts):
            linear = get_linear_quant_method(self, layer, prefix, self._linear)
            if isinstance(linear, AutoGPTQLinearMethod):
                linear.input_dtype = get_marlin_input_dtype(prefix)
            return linear
        method = super().get_quant_method(layer, prefix)
        config = getattr(method, "quant_config", None)
        if isinstance(config, GptqConfig) and (config.desc_act or not config.is_sym):
            raise ValueError(f"desc_act={config.desc_act}, sym={config.is_sym} is for LvLLM alone")
        return method

    @staticmethod
    def _linear(config: Any) -> Any:
        plain = config.is_sym and not config.desc_act
        if plain and check_marlin_supported(config.quant_type, config.group_size):
            return AutoGPTQLinearMethod(config)
        return GptqLinear(
            config.weight_bits,
            config.group_size,
            symmetric=config.is_sym,
            ordered=config.desc_act,
            v2=config.full_config.get("checkpoint_format") == "gptq_v2",
        )


class CompressedConfig(CompressedTensorsConfig):
    """compressed-tensors with act-order (actorder group or dynamic) in experts as well."""

    @classmethod
    def _quantization_scheme_map_from_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        # vLLM's own raises for act-order.
        unordered = deepcopy(config)
        orders: dict[str, str] = {}
        for group in (unordered.get("config_groups") or {}).values():
            if (group.get("weights") or {}).get("actorder") in ORDERED:
                order = group["weights"].pop("actorder")
                orders |= dict.fromkeys(group["targets"], order)
        schemes: dict[str, Any] = super()._quantization_scheme_map_from_config(unordered)
        for target, order in orders.items():
            weights = schemes[target]["weights"]
            schemes[target]["weights"] = weights.model_copy(update={"actorder": order})
        return schemes

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method of a linear layer or of resident experts.

        The method of other experts comes from `lvllm.formats`.
        """
        if isinstance(layer, RoutedExperts):
            schemes = filter(None, self.target_scheme_map.values())
            for weights in filter(None, (scheme.get("weights") for scheme in schemes)):
                if weights.actorder in ORDERED:
                    raise ValueError(f"actorder={weights.actorder!r} is for LvLLM alone")
        if isinstance(layer, LinearBase):
            scheme = self.get_scheme_dict(layer, prefix) or {}
            weights = scheme.get("weights")
            if weights is not None and weights.actorder in ORDERED:
                raise LayerError(
                    f"{prefix}: actorder={weights.actorder!r} of a linear layer is not supported;"
                    " experts may have it"
                )
        return super().get_quant_method(layer, prefix)


class AutoRoundConfig(INCConfig):
    """AutoRound in GPTQ's packing with zero points and 8 bits as well."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method of a linear layer or of resident experts.

        The method of other experts comes from `lvllm.formats`.
        """
        if isinstance(layer, LinearBase):
            how = self.config_parser.resolve(layer, prefix)
            integers = how.is_wna16_int and how.is_gptq and how.bits in (4, 8)
            upstream = (4,) if current_platform.is_cpu() else (4, 8)
            if integers and not (how.sym and how.bits in upstream):
                return GptqLinear(
                    how.bits, how.group_size, symmetric=how.sym, ordered=False, v2=False
                )
        return super().get_quant_method(layer, prefix)


class GgufConfig(QuantizationConfig):
    """Experts in the blocks of a GGUF file, beside layers whose weights are computed from theirs.

    vLLM has no such configuration. `section` is what config.json says (`lvllm.formats.gguf`).
    """

    def __init__(self, section: dict[str, Any]) -> None:
        super().__init__()
        self.section = section

    def get_name(self) -> Any:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GgufConfig":
        return cls(config)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method of a linear layer, which is that of a checkpoint in 16 bits.

        Raises ValueError for experts, which LvLLM alone computes.
        """
        if isinstance(layer, RoutedExperts):
            raise ValueError("it has no kernels for the blocks of GGUF files")
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def register() -> None:
    """Register these classes in the place of vLLM's."""
    for name in (*gptq.DESCRIPTOR.quantizations, "gptq_marlin"):
        register_quantization_config(name)(GptqConfig)
    register_quantization_config("compressed-tensors")(CompressedConfig)
    register_quantization_config("inc")(AutoRoundConfig)
    register_quantization_config(METHOD)(GgufConfig)
