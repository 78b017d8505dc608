"""LvLLM's linear layers, where vLLM chooses the kernel of a layer."""

from typing import Any

from lvllm.patches.registry import patch

__all__ = ["multiply_on_the_engine", "offer_fp8_linear"]


@patch(
    "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
    signature="(layer, remove_weight)",
    why="In models with experts on the CPU, the engine multiplies the other linear layers as well."
    " On CPUs with AVX2 only, vLLM multiplies bf16 at a tenth of the CPU's rate, and"
    " LVLLM_DENSE_WEIGHT=INT8 has no counterpart in vLLM.",
    upstream="none, because register_linear_kernel takes no kernels for unquantised layers",
    until="register_linear_kernel takes kernels for unquantised layers on CPUs",
    platform="cpu",
)
def multiply_on_the_engine(original: Any) -> Any:
    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        from lvllm.upstream import engine_linear

        if not engine_linear.take(layer, remove_weight=remove_weight):
            original(layer, remove_weight)

    return dispatch_cpu_unquantized_gemm


@patch(
    "vllm.model_executor.kernels.linear:_POSSIBLE_FP8_BLOCK_KERNELS",
    signature="dict",
    why="vLLM's public register_linear_kernel takes no kernels for FP8 weights with a scale for"
    " each block. This table of candidates is where vLLM looks for them.",
    upstream="none, because nothing was proposed yet",
    until='register_linear_kernel takes the type "fp8_block"',
    platform="cpu",
)
def offer_fp8_linear(original: Any) -> Any:
    from vllm.platforms.interface import PlatformEnum

    from lvllm.upstream.fp8_linear import DequantizedFp8Linear

    # It comes last: upstream's own kernels are taken wherever they run.
    return original | {PlatformEnum.CPU: [*original[PlatformEnum.CPU], DequantizedFp8Linear]}
