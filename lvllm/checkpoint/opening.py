"""The tensors of a model in a local folder, whatever kind of files it has."""

from pathlib import Path

from lvllm.checkpoint.gguf.finding import gguf_of
from lvllm.checkpoint.gguf.folder import is_presented
from lvllm.checkpoint.gguf.tensors import checkpoint_of
from lvllm.checkpoint.headers import Checkpoint

__all__ = ["open_checkpoint"]


def open_checkpoint(folder: Path) -> Checkpoint:
    """The tensors of all safetensors files of a folder, or else of its GGUF file.

    Raises CheckpointError.
    """
    file = gguf_of(str(folder))
    if file is None:
        return Checkpoint.open(folder)
    # Errors are to name the user's file, and not the link to it.
    return checkpoint_of(file.readlink() if is_presented(folder) else file)
