"""What a model's files say about it, read without vLLM: config.json and the headers of files."""

from lvllm.checkpoint.headers import (
    INDEX,
    Checkpoint,
    CheckpointError,
    TensorInfo,
    pickle_refused,
    read_header,
)
from lvllm.checkpoint.moe_layers import layer_number, moe_layers

__all__ = [
    "INDEX",
    "Checkpoint",
    "CheckpointError",
    "TensorInfo",
    "layer_number",
    "moe_layers",
    "pickle_refused",
    "read_header",
]
