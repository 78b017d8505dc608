"""What the quantisation configs that LvLLM adds refuse."""

import pytest
from vllm.model_executor.layers.fused_moe import RoutedExperts

from lvllm.errors import LvllmError
from lvllm.upstream.quantization_configs import GgufConfig


def test_resident_experts_of_a_gguf_file() -> None:
    experts = RoutedExperts.__new__(RoutedExperts)
    with pytest.raises(LvllmError, match=r"RESIDENT_MOE_LAYERS must not .* LVLLM_GPU_EXPERT_CACHE"):
        GgufConfig({}).get_quant_method(experts, "model.layers.3.mlp.experts")
