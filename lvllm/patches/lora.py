"""LoRA on everything but the experts.

vLLM would wrap a layer's runner, to add adapters to its experts inside kernels of its own. With the
experts left out of what it takes adapters for, one that has them is refused when it is loaded.
"""

from typing import Any

__all__ = ["register"]


def register() -> None:
    """Take the experts from what vLLM supports adapters for."""
    from vllm.lora import model_manager
    from vllm.model_executor.layers.fused_moe import MoERunner

    upstream = model_manager.get_supported_lora_modules
    if upstream.__module__ == __name__:
        return

    def get_supported_lora_modules(model: Any) -> list[str]:
        experts = {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, MoERunner)
        }
        return [name for name in upstream(model) if name not in experts]

    model_manager.get_supported_lora_modules = get_supported_lora_modules
