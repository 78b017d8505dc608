"""Split tensors that hold all experts of a layer into a matrix for each expert and projection.

Such matrices are what compressed-tensors quantises, and most families of models have names for
them.
"""

import re
from collections.abc import Iterable, Iterator
from math import prod

from lvllm.checkpoint.headers import TensorInfo
from lvllm.export.tensorfile import ExportError, TransposedMatrix

__all__ = ["FAMILIES", "split"]

FAMILIES = (
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Gemma4ForConditionalGeneration",
    "Gemma4ForCausalLM",
)
"""Architectures that store all gate rows before all up rows, and that have no biases. Shapes do not
tell that: gpt-oss stores gate and up rows in turns, and vLLM loads its experts in no format of
compressed-tensors.
"""
FUSED = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")


def split(tensors: Iterable[TensorInfo], architecture: str) -> list[TensorInfo]:
    """Replace experts.gate_up_proj and experts.down_proj among `tensors`.

    In their place each expert gets experts.N.gate_proj.weight, up_proj and down_proj. The shapes
    are [E, 2I, H] and [E, H, I], or transposed [E, H, 2I] and [E, I, H]; no pair of shapes fits
    both. Raises ExportError for any other shapes. Nothing is split if the architecture is not in
    FAMILIES.
    """
    found = {tensor.name: tensor for tensor in tensors}
    if architecture not in FAMILIES:
        return list(found.values())
    layers: dict[str, dict[str, TensorInfo]] = {}
    for name in list(found):
        if match := FUSED.fullmatch(name):
            layers.setdefault(match[1], {})[match[2]] = found.pop(name)
    for stem, pair in layers.items():
        for name in ("gate_up_proj", "down_proj"):
            if name not in pair:
                (there,) = pair
                raise ExportError(f"{stem}.{name} is missing, {stem}.{there} is there")
        for matrix in _matrices(stem, pair["gate_up_proj"], pair["down_proj"]):
            if matrix.name in found:
                raise ExportError(f"{matrix.name} is in {stem}.gate_up_proj and down_proj, too")
            found[matrix.name] = matrix
    return list(found.values())


def _matrices(stem: str, gate_up: TensorInfo, down: TensorInfo) -> Iterator[TensorInfo]:
    """The matrices of all experts of one layer."""
    match (gate_up.shape, down.shape):
        case ((experts, both, hidden), (of, rows, inner)) if (experts, both, hidden) == (
            of,
            2 * inner,
            rows,
        ):
            transposed = False
        case ((experts, hidden, both), (of, inner, columns)) if (experts, hidden, both) == (
            of,
            columns,
            2 * inner,
        ):
            transposed = True
        case _:
            raise ExportError(
                f"{gate_up.name} is {list(gate_up.shape)}, {down.name} {list(down.shape)}: wanted"
                " are [E, 2I, H] and [E, H, I], or [E, H, 2I] and [E, I, H]"
            )
    for name, tensor, first, shape in (
        ("gate_proj", gate_up, 0, (inner, hidden)),
        ("up_proj", gate_up, inner, (inner, hidden)),
        ("down_proj", down, 0, (hidden, inner)),
    ):
        size, columns = tensor.dtype.itemsize, tensor.shape[2]
        for expert in range(experts):
            start = tensor.start + expert * tensor.shape[1] * columns * size
            full = f"{stem}.{expert}.{name}.weight"
            if transposed:
                end = start + tensor.shape[1] * columns * size
                yield TransposedMatrix(
                    full, tensor.file, tensor.dtype, shape, start, end, first=first, stored=columns
                )
            else:
                start += first * columns * size
                end = start + prod(shape) * size
                yield TensorInfo(full, tensor.file, tensor.dtype, shape, start, end)
