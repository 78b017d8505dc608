"""The tensors of a GGUF file under their Hugging Face names, with their places in the file.

Routed experts are raw: uint8 [rows, bytes of a row] of blocks as they are in the file, one tensor
for each projection of each expert. Any other tensor in blocks is a float32 tensor of its shape,
whose `blocks` say how the values are stored. Floats are what they are.
"""

import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from lvllm.checkpoint.gguf.architecture import (
    EXPERTS,
    FUSED,
    ONE_ROW,
    Architecture,
    layer_of,
)
from lvllm.checkpoint.gguf.architectures import architecture_of
from lvllm.checkpoint.gguf.fields import Fields
from lvllm.checkpoint.gguf_headers import GgufHeader, GgufTensor, open_gguf
from lvllm.checkpoint.headers import Checkpoint, CheckpointError, TensorInfo
from lvllm.checkpoint.moe_layers import MOST_LAYERS
from lvllm.errors import quoted

__all__ = ["FLOATS", "check_data", "checkpoint_of", "expert_types", "tensors_of"]

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types that are plain numbers."""
MOST_EXPERTS = 1 << 17
"""Of all layers together. The largest models have 25 000."""
_EXPERT = re.compile(r"\.experts\.\{\}\.")


def checkpoint_of(file: Path) -> Checkpoint:
    """The tensors of a model's only GGUF file, or of all its parts. Raises CheckpointError."""
    header = open_gguf(file)
    return Checkpoint(header.files, tensors_of(header, architecture_of(Fields(header))))


def tensors_of(
    header: GgufHeader, architecture: Architecture, *, raw_experts: bool = True
) -> dict[str, TensorInfo]:
    """All tensors by their Hugging Face names, without the layers that only draft tokens.

    Without `raw_experts`, experts have their values, as all other tensors do.

    Raises CheckpointError for a tensor that the architecture does not have, that is in a type which
    nobody can read, or that is not in its file as a whole.
    """
    check_data(header)
    fields = Fields(header)
    layers, all_layers = fields.layers, fields.whole("block_count", 1, MOST_LAYERS)
    experts = fields.whole("expert_count", 1, MOST_EXPERTS // layers)
    found: dict[str, TensorInfo] = {}
    for tensor in header.tensors.values():
        place = layer_of(tensor.name)
        if place is not None and layers <= place[0] < all_layers:
            continue
        if tensor.name in architecture.unused:
            continue
        parts = _parts(tensor.name)
        names = [name for part in parts if (name := architecture.rename(part)) is not None]
        if len(names) < len(parts) or (place is not None and place[0] >= layers):
            raise tensor.refuse(f"a model of {fields.architecture} with {layers} layers has none")
        if _EXPERT.search(names[0]):
            found |= {one.name: one for one in _experts(tensor, names, experts, raw_experts)}
        else:
            found[names[0]] = _whole(tensor, names[0])
    return found


def _parts(name: str) -> list[str]:
    """The names of the tensors that a tensor of this name has one after the other."""
    if FUSED not in name:
        return [name]
    return [name.replace(FUSED, part) for part in EXPERTS[:2]]


def _whole(tensor: GgufTensor, name: str) -> TensorInfo:
    end = tensor.start + tensor.nbytes
    shape = tuple(reversed(tensor.shape))
    place = layer_of(tensor.name)
    if place is not None and place[1].removesuffix(".weight") in ONE_ROW:
        shape = (1, *shape) if len(shape) == 1 else shape
    if tensor.type in FLOATS:
        return TensorInfo(name, tensor.file, FLOATS[tensor.type], shape, tensor.start, end)
    return TensorInfo(
        name, tensor.file, torch.float32, shape, tensor.start, end, blocks=_readable_type(tensor)
    )


def _readable_type(tensor: GgufTensor) -> str:
    """The type of a tensor in blocks. Raises CheckpointError if nobody knows its values."""
    if not _readable(tensor.type):
        raise tensor.refuse(f"the gguf package cannot read the type {tensor.type}")
    return tensor.type


def _experts(tensor: GgufTensor, names: Sequence[str], experts: int, raw: bool) -> list[TensorInfo]:
    """One tensor for each expert of a stacked one and, if it is fused, for each name."""
    if len(tensor.shape) != 3 or tensor.shape[2] != experts or tensor.shape[1] % len(names):
        raise tensor.refuse(
            f"has the shape {list(reversed(tensor.shape))}, wanted is [{experts}, rows, columns]"
        )
    columns, rows, _ = tensor.shape
    rows //= len(names)
    size = tensor.nbytes // experts // len(names)
    plain = tensor.type in FLOATS
    dtype = FLOATS.get(tensor.type, torch.uint8 if raw else torch.float32)
    shape = (rows, columns if plain or not raw else size // rows)
    blocks = None if plain or raw else _readable_type(tensor)
    called = [name.format(number) for number in range(experts) for name in names]
    starts = range(tensor.start, tensor.start + tensor.nbytes, size)
    return [
        TensorInfo(name, tensor.file, dtype, shape, start, start + size, blocks=blocks)
        for name, start in zip(called, starts, strict=True)
    ]


def expert_types(header: GgufHeader) -> dict[int, tuple[str, str, str]]:
    """ggml's types of the experts in each layer that has some: gate, up and down.

    Experts without a gate have the type of up in its place. Raises CheckpointError for a layer that
    lacks one of them.
    """
    fields = Fields(header)
    gated = architecture_of(fields).gated
    layers = range(fields.dense_layers, fields.layers)
    found: dict[int, dict[str, str]] = {layer: {} for layer in layers}
    for tensor in header.tensors.values():
        place = layer_of(tensor.name)
        if place is not None and place[0] in found:
            for part in _parts(place[1].removesuffix(".weight")):
                found[place[0]][part] = tensor.type
    types: dict[int, tuple[str, str, str]] = {}
    wanted = EXPERTS if gated else EXPERTS[1:]
    for layer, of_layer in found.items():
        missing = [name for name in wanted if name not in of_layer]
        if missing and (gated or len(missing) < len(wanted)):
            raise CheckpointError(f"{header.file}: has no tensor 'blk.{layer}.{missing[0]}.weight'")
        if not missing:
            _, up, down = (of_layer.get(name, "") for name in EXPERTS)
            types[layer] = of_layer[wanted[0]], up, down
    return types


def check_data(header: GgufHeader) -> None:
    """Raise CheckpointError unless all tensors are in their files, and none overlaps another."""
    sizes = {file: os.stat(file).st_size for file in header.files}
    last: GgufTensor | None = None
    for tensor in sorted(header.tensors.values(), key=lambda one: (one.file, one.start)):
        end = tensor.start + tensor.nbytes
        if end > sizes[tensor.file]:
            raise tensor.refuse(f"truncated: ends at byte {end}, the file has {sizes[tensor.file]}")
        same_file = last is not None and last.file == tensor.file
        if last is not None and same_file and tensor.start < last.start + last.nbytes:
            raise tensor.refuse(f"overlaps tensor {quoted(last.name)}")
        last = tensor


@cache
def _readable(type_name: str) -> bool:
    """Whether the gguf package knows the values of a type."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[type_name]
    try:
        dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8), kind)
    except NotImplementedError:
        return False
    return True
