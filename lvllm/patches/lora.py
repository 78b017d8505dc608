"""LoRA on everything but the experts.

To add adapters to experts, vLLM wraps their layer's runner and applies the adapters inside kernels
of its own, which lk does not run.
"""

from typing import Any

from lvllm.patches.registry import patch

__all__ = ["leave_out_experts"]


@patch(
    "vllm.lora.model_manager:get_supported_lora_modules",
    signature="(model)",
    why="vLLM would wrap the runner of every layer of experts. Without the experts among the"
    " supported modules, an adapter for experts is refused when it is loaded, and all other"
    " adapters work.",
    upstream="none, because vLLM's own experts do support adapters",
    until="the method of a layer may say that it takes no adapters",
)
def leave_out_experts(original: Any) -> Any:
    from vllm.model_executor.layers.fused_moe import MoERunner

    def get_supported_lora_modules(model: Any) -> list[str]:
        experts = {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, MoERunner)
        }
        return [name for name in original(model) if name not in experts]

    return get_supported_lora_modules
