"""Load the engine's operators into PyTorch, as torch.ops.lvllm."""

from pathlib import Path

import torch

__all__ = ["raw_ops"]

_LIBRARY = Path(__file__).with_name("_engine.so")
if not _LIBRARY.exists():
    raise ImportError(f"{_LIBRARY} is missing: build it with `pip install -e .`")
torch.ops.load_library(str(_LIBRARY))
raw_ops = torch.ops.lvllm


@torch.library.register_fake("lvllm::expert_block")
def _expert_block_fake(
    x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, layer: torch.Tensor
) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("lvllm::linear")
def _linear_fake(x: torch.Tensor, layer: torch.Tensor, rows: int) -> torch.Tensor:
    return x.new_empty((x.shape[0], rows))
