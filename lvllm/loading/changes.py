"""Tensors of GGUF files as Hugging Face checkpoints have them, where ggml's tools change them."""

import re
from collections.abc import Iterable, Iterator

import torch

from lvllm.checkpoint.gguf.architecture import Architecture
from lvllm.checkpoint.gguf.fields import Fields

__all__ = ["undo_changes"]

_LAYER = re.compile(r"^(model\.layers\.\d+\.)(.+)$")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")

Named = tuple[str, torch.Tensor]


def undo_changes(
    architecture: Architecture, fields: Fields, tensors: Iterable[Named]
) -> Iterator[Named]:
    """The (name, tensor) pairs of a file, with its parts of a tensor put together.

    A tensor is computed in memory when its last part has come. A tensor with a missing part does
    not come.
    """
    whole = {part: name for name, change in architecture.changes.items() for part in change.parts}
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        found = _LAYER.match(name)
        prefix, own = found.groups() if found else ("", name)
        number = _EXPERT.search(own)
        part = _EXPERT.sub("{}", own)
        if part not in whole:
            yield name, tensor
            continue
        change = architecture.changes[whole[part]]
        result = prefix + whole[part].format(number and number[0])
        parts = waiting.setdefault(result, {})
        parts[part] = tensor
        if len(parts) == len(change.parts):
            del waiting[result]
            yield result, change.compute(fields, [parts[one] for one in change.parts])
