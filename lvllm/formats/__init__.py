"""Checkpoint formats: one module each, and a registry over them.

Each module in `FORMATS` has

DESCRIPTOR: Descriptor
    what config.json and the files' headers say of such a checkpoint;
find(quant_config, layer, prefix) -> ExpertFormat | None
    how the experts of the vLLM layer called `prefix` are stored; None for another format.

Importing this package imports no vLLM, so that what a checkpoint needs can be planned without it;
vLLM takes 10 s and more to start. Therefore `find` knows vLLM's configurations by their names, and
what it calls of vLLM it imports when it runs.
"""

from collections.abc import Collection
from types import ModuleType
from typing import Any

from lvllm.formats import (
    auto_round,
    awq,
    compressed_tensors,
    fp8,
    gguf,
    gpt_oss,
    gptq,
    modelopt,
    unquantized,
)
from lvllm.formats.base import ExpertFormat
from lvllm.formats.descriptor import Descriptor, Section, Stored, union
from lvllm.formats.section import check

__all__ = [
    "FORMATS",
    "QUANTIZATIONS",
    "Descriptor",
    "ExpertFormat",
    "Section",
    "Stored",
    "describe",
    "find",
    "is_divisor",
    "is_weight_scale",
    "only_4_bit",
]

FORMATS: tuple[ModuleType, ...] = (
    gpt_oss,  # It comes first: it knows its experts by the model, whatever their format.
    unquantized,
    fp8,
    compressed_tensors,
    modelopt,
    awq,
    gptq,
    auto_round,
    gguf,
)
_DESCRIPTORS: tuple[Descriptor, ...] = tuple(module.DESCRIPTOR for module in FORMATS)

QUANTIZATIONS = union(descriptor.quantizations for descriptor in _DESCRIPTORS)
"""vLLM's names of all quantised formats that LvLLM reads."""

_SCALES = union(descriptor.scales for descriptor in _DESCRIPTORS)
_INPUT_SCALES = union(descriptor.input_scales for descriptor in _DESCRIPTORS)
_DIVISORS = union(descriptor.divisors for descriptor in _DESCRIPTORS)

# Enough of the names that model families give to a projection of a routed expert to recognise
# where a checkpoint lists it.
_EXPERTS = (
    "model.layers.{}.mlp.experts.0.down_proj",
    "model.language_model.layers.{}.mlp.experts.0.down_proj",
    "model.layers.{}.block_sparse_moe.experts.0.w2",
)


def find(quant_config: Any, layer: Any, prefix: str) -> ExpertFormat:
    """The format of the experts of vLLM's `layer`, called `prefix`.

    `quant_config` is vLLM's configuration of the checkpoint's quantisation, or None.

    Raises ValueError if LvLLM does not read the format.
    """
    for module in FORMATS:
        found: ExpertFormat | None = module.find(quant_config, layer, prefix)
        if found is not None:
            return found
    raise ValueError(
        f"{prefix}: experts quantised as {quant_config.get_name()!r} are not supported; supported"
        f" are {', '.join(descriptor.name for descriptor in _DESCRIPTORS)}"
    )


def describe(section: Section | None) -> Descriptor | None:
    """The format of a checkpoint with this `quantization_config` in its config.json.

    A checkpoint without a section is not quantised. None stands for a format that LvLLM does not
    read.

    Raises CheckpointError for a section with a value of a wrong type.
    """
    if section is None:
        return unquantized.DESCRIPTOR
    check(section)
    method = str(section.get("quant_method", "")).lower()
    return next((found for found in _DESCRIPTORS if method in found.quant_methods), None)


def only_4_bit(section: Section | None, layers: Collection[int]) -> bool:
    """Whether the routed experts of all these layers are stored in 4 bits that lk computes as they
    are.
    """
    descriptor = describe(section)
    if descriptor is None or section is None:
        return False
    experts = (name.format(layer) for name in _EXPERTS for layer in layers)
    stored = {descriptor.of_module(section, expert) for expert in experts}
    return all(how.bits == 4 and how.computable for how in stored)


def is_weight_scale(tensor: str) -> bool:
    """Whether a tensor of this name holds scales of weights, in any format."""
    return tensor.endswith(_SCALES) and not tensor.endswith(_INPUT_SCALES)


def is_divisor(tensor: str) -> bool:
    """Whether weights are divided by what a tensor of this name holds, in any format."""
    return tensor.endswith(_DIVISORS)
