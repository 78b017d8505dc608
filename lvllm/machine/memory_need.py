"""How much memory a model's weights need, from the headers of its files and its config.json.

This needs neither vLLM nor the weights. The sums are lower bounds: they leave out each rank's
interpreter and buffers, about 1 GiB. So a model that does not fit by these sums cannot fit.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lvllm import formats
from lvllm.checkpoint.headers import TensorInfo
from lvllm.checkpoint.moe_layers import layer_number
from lvllm.formats import Section, integers, unquantized
from lvllm.settings.variables import UseWeight
from lvllm.units import gib

__all__ = ["Need", "folder_of", "needed"]

_EXPERTS = re.compile(r"\.experts\.")
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
    use: UseWeight | None,
    *,
    layers: int,
    drafts: bool = False,
    resident: Collection[int] | None = None,
    section: Section | None = None,
) -> Need:
    """The bytes of a checkpoint's weights, without a KV cache.

    Args:
        tensors: the tensors of all files, by name.
        use: LVLLM_MOE_USE_WEIGHT.
        layers: the number of decoder layers. Later layers are drafts, for speculative decoding.
        drafts: whether the drafts are loaded.
        resident: the resident layers, whose experts vLLM holds in the checkpoint's format. vLLM
            then holds the drafts' experts too. None: there is no accelerator.
        section: `quantization_config` of config.json.
    """
    count = _Weights(section)
    experts = others = weights = 0
    for name, tensor in tensors.items():
        layer = layer_number(name)
        draft = _DRAFTS.search(name) is not None or (layer is not None and layer >= layers)
        if draft and not drafts:
            continue
        # vLLM runs the model in 16 bits.
        size = tensor.nbytes // (2 if tensor.dtype == torch.float32 else 1)
        with_vllm = resident is not None and (draft or layer in resident)
        if with_vllm or _EXPERTS.search(name) is None:
            others += size
            continue
        experts += size
        weights += count(tensor)
    int4 = int(weights * integers.INT4_BITS / 8)
    in_memory = {UseWeight.TO_DTYPE: weights * 2, UseWeight.INT4: int4}
    return Need(in_memory.get(use, experts) if use else experts, others, 0, int4)


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
