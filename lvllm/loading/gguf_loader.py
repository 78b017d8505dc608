"""vLLM's loader of models in GGUF files, which vLLM itself does not read.

It is vLLM's default loader, with LvLLM's reader and checks, for the folder that stands for a GGUF
file (`lvllm.checkpoint.gguf.folder`).
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor import model_loader as loaders
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from lvllm.checkpoint.gguf.architectures import METHOD, architecture_of
from lvllm.checkpoint.gguf.fields import Fields
from lvllm.checkpoint.gguf_headers import open_gguf
from lvllm.checkpoint.opening import open_checkpoint
from lvllm.loading import model_loader
from lvllm.loading.changes import undo_changes

__all__ = ["GgufModelLoader", "register"]


class GgufModelLoader(DefaultModelLoader):
    """The loader of the load format `gguf`."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        # vLLM does not do so for quantised models by default: checkpoints may lack scales.
        self.enable_weights_track = True

    def download_model(self, model_config: Any) -> None:
        """Nothing: the file is there."""

    def get_all_weights(  # type: ignore[override]
        self, model_config: Any, model: torch.nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield all tensors by their names in Hugging Face checkpoints. Raises CheckpointError."""
        self.counter_before_loading_weights = time.perf_counter()
        checkpoint = open_checkpoint(Path(model_config.model))
        fields = Fields(open_gguf(checkpoint.files[0]))
        stored = model_loader.tensors_of(
            checkpoint, self.load_config.use_tqdm_on_load, self.local_expert_ids
        )
        yield from undo_changes(architecture_of(fields), fields, stored)


def register() -> None:
    """Register the loader, once in each process."""
    if loaders._LOAD_FORMAT_TO_MODEL_LOADER.get(METHOD) is not GgufModelLoader:
        loaders.register_model_loader(METHOD)(GgufModelLoader)
