"""The tensors of a GGUF file as files of a checkpoint: one for each layer, and one for the rest.

Values in blocks become bfloat16, in which vLLM computes them, too. Floats stay as they are.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import torch

from lvllm.checkpoint.files import OpenFile
from lvllm.checkpoint.gguf.architecture import Architecture
from lvllm.checkpoint.gguf.architectures import architecture_of
from lvllm.checkpoint.gguf.fields import Fields
from lvllm.checkpoint.gguf.tensors import tensors_of
from lvllm.checkpoint.gguf_headers import GgufHeader
from lvllm.checkpoint.headers import DTYPES, CheckpointError, TensorInfo
from lvllm.checkpoint.moe_layers import layer_number
from lvllm.export.tensorfile import NAMES, ExportError, Tensor
from lvllm.loading.changes import undo_changes
from lvllm.loading.file_tensor import FileTensor

__all__ = ["GgufShard", "shards"]


class GgufShard:
    """Some tensors of a model, which are to be written to the file `path`."""

    def __init__(
        self, path: Path, architecture: Architecture, fields: Fields, stored: Iterable[TensorInfo]
    ) -> None:
        self.path = path
        self._architecture = architecture
        self._fields = fields
        self._stored = list(stored)
        self._files: dict[Path, OpenFile] = {}
        self._read: dict[str, torch.Tensor] = {}
        shapes = [
            (one.name, torch.empty(one.shape, dtype=_becomes(one), device="meta"))
            for one in self._stored
        ]
        self.tensors = {
            name: Tensor(name, NAMES[made.dtype], tuple(made.shape))
            for name, made in undo_changes(architecture, fields, shapes)
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._read.clear()
        self._files.clear()

    def read(self, name: str) -> torch.Tensor:
        """A tensor as a Hugging Face checkpoint has it, in memory of its own.

        Raises ExportError for a file that ends early, and for NaN and infinity in blocks.
        """
        wanted = self.tensors[name]
        try:
            if name not in self._read:
                of_file = ((one.name, self._open(one)) for one in self._stored)
                self._read = dict(undo_changes(self._architecture, self._fields, of_file))
            found = torch.empty(wanted.shape, dtype=DTYPES[wanted.dtype])
            return found.copy_(self._read.pop(name))
        except CheckpointError as error:
            raise ExportError(str(error)) from None

    def _open(self, one: TensorInfo) -> FileTensor:
        if one.file not in self._files:
            self._files[one.file] = OpenFile(one.file)
        return FileTensor.of(one, self._files[one.file].fill)


def shards(header: GgufHeader) -> list[GgufShard]:
    """The files of a checkpoint of this model. Raises CheckpointError."""
    fields = Fields(header)
    architecture = architecture_of(fields)
    placed: dict[int, list[TensorInfo]] = defaultdict(list)
    for tensor in tensors_of(header, architecture, raw_experts=False).values():
        number = layer_number(tensor.name)
        placed[-1 if number is None else number].append(tensor)
    return [
        GgufShard(
            Path(f"model-{count:05}-of-{len(placed):05}.safetensors"), architecture, fields, stored
        )
        for count, (_, stored) in enumerate(sorted(placed.items()), 1)
    ]


def _becomes(tensor: TensorInfo) -> torch.dtype:
    return tensor.dtype if tensor.blocks is None else torch.bfloat16
