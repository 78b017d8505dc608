"""LvLLM's FP8 linear layer among the kernels that vLLM chooses from."""

from typing import Any

from lvllm.patches.registry import patch

__all__ = ["offer_fp8_linear"]


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
