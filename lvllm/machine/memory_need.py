"""How much memory a model's weights need, from the headers of its files and its config.json.

This needs neither vLLM nor the weights. The sums are lower bounds: they leave out each rank's
interpreter and buffers, about 1 GiB. So a model that does not fit by these sums cannot fit.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lvllm import formats
from lvllm.checkpoint.headers import TensorInfo
from lvllm.checkpoint.moe_layers import layer_number
from lvllm.formats import Section, integers, unquantized
from lvllm.settings.use_weight import LayerFormats, UseWeight
from lvllm.units import gib

__all__ = ["Need", "folder_of", "layers_of_experts", "needed"]

_EXPERTS = re.compile(r"(.*\.experts)\.")
_EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")
_DRAFTS = re.compile(r"^(?:model\.)?mtp\.")


@dataclass(frozen=True)
class Need:
    """The bytes that a model takes on this host, for all ranks together."""

    experts: int
    others: int
    """All weights but the routed experts."""
    kv_cache: int
    experts_int4: int
    """Bytes that the experts would take with LVLLM_MOE_USE_WEIGHT=INT4."""
    prefill_engine: int = 0
    """Bytes that a second engine takes beside the experts: its other weights, its KV cache, and as
    much as that KV cache again for keys and values on their way to the first engine.
    """

    @property
    def total(self) -> int:
        return self.experts + self.others + self.kv_cache + self.prefill_engine

    def describe(self) -> str:
        parts = f"experts {gib(self.experts)}, other weights {gib(self.others)}"
        more = {"KV cache": self.kv_cache, "prefill engine": self.prefill_engine}
        return parts + "".join(f", {name} {gib(size)}" for name, size in more.items() if size)


def needed(
    tensors: Mapping[str, TensorInfo],
    use: LayerFormats | None,
    *,
    layers: int,
    drafts: bool = False,
    resident: Collection[int] | None = None,
    section: Section | None = None,
) -> Need:
    """The bytes of a checkpoint's weights, without a KV cache.

    Args:
        tensors: the tensors of all files, by name.
        use: LVLLM_MOE_USE_WEIGHT; None: it is not set.
        layers: the number of decoder layers. Later layers are drafts, for speculative decoding.
        drafts: whether the drafts are loaded.
        resident: the resident layers, whose experts vLLM holds in the checkpoint's format. vLLM
            then holds the drafts' experts too. None: there is no accelerator.
        section: `quantization_config` of config.json.
    """
    count, use = _Weights(section), use or LayerFormats()
    others = 0
    stored: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for name, tensor in tensors.items():
        draft = _is_draft(name, layers)
        if draft and not drafts:
            continue
        # vLLM runs the model in 16 bits.
        if tensor.blocks is not None:
            size = 2 * math.prod(tensor.shape)
        else:
            size = tensor.nbytes // (2 if tensor.dtype == torch.float32 else 1)
        with_vllm = resident is not None and (draft or layer_number(name) in resident)
        of_experts = _EXPERTS.match(name)
        if with_vllm or of_experts is None:
            others += size
            continue
        stored[of_experts[1]] += size
        held[of_experts[1]] += count(tensor)
    experts: dict[UseWeight, int] = dict.fromkeys(UseWeight, 0)
    for layer, size in stored.items():
        how = use.of(layer)
        if how in (UseWeight.INT8, UseWeight.FP8) and size < 2 * held[layer]:
            how = UseWeight.KEEP  # Experts of fewer than 16 bits stay as they are.
        experts[how] += size if how == UseWeight.KEEP else held[layer]
    total = (
        experts[UseWeight.KEEP]
        + experts[UseWeight.TO_DTYPE] * 2
        + experts[UseWeight.INT8]
        + experts[UseWeight.FP8]
        + int(experts[UseWeight.INT4] * integers.INT4_BITS / 8)
    )
    return Need(total, others, 0, int(held.total() * integers.INT4_BITS / 8))


def layers_of_experts(tensors: Iterable[str], *, layers: int, drafts: bool) -> list[str]:
    """The checkpoint's names for the experts of each layer that is loaded, in the layers' order."""
    names = (_EXPERTS.match(name) for name in tensors if drafts or not _is_draft(name, layers))
    found = {name[1] for name in names if name is not None}
    return sorted(found, key=lambda name: (layer_number(name) or 0, name))


def _is_draft(name: str, layers: int) -> bool:
    """Whether a tensor belongs to a draft, in a model with so many decoder layers."""
    number = layer_number(name)
    return _DRAFTS.search(name) is not None or (number is not None and number >= layers)


class _Weights:
    """Counts the weights that tensors of routed experts hold."""

    def __init__(self, section: Section | None) -> None:
        # A format that LvLLM does not read is refused elsewhere. Here its integers count as 8 bits.
        self._format = formats.describe(section) or unquantized.DESCRIPTOR
        self._section = section or {}
        self._stored: dict[str, formats.Stored] = {}

    def __call__(self, tensor: TensorInfo) -> int:
        if not self._format.holds_weights(tensor.name):
            return 0
        # All experts of a layer are stored alike, so the answer for expert 0 is kept for all. A
        # model may have 100 000 tensors of experts.
        module = _EXPERT_NUMBER.sub(".experts.0.", tensor.name.rpartition(".")[0])
        if module not in self._stored:
            self._stored[module] = self._format.of_module(self._section, module)
        return self._format.weights_in(tensor, self._stored[module])


def folder_of(model: str, revision: str | None) -> Path | None:
    """Where the files of a model are on this machine; None if they must be downloaded first."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:  # The name is not that of a repository.
        return None
    return Path(config).parent if isinstance(config, str) else None
