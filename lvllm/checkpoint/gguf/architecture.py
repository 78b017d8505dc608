"""The description of a model family in GGUF files, and the names of tensors."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lvllm.checkpoint.gguf.fields import Fields

__all__ = ["EXPERTS", "FUSED", "ONE_ROW", "OUTSIDE", "Architecture", "Change", "layer_of"]

EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
"""The stacked experts of a layer, in the order gate, up, down."""
FUSED = "ffn_gate_up_exps"
"""Gate and up in one tensor, which some files have: of each expert the rows of gate, then of up."""
ONE_ROW = ("ffn_gate_inp_shexp",)
"""Matrices of one row, which the file has as vectors."""
OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = re.compile(r"^blk\.(\d{1,9})\.(.+)$")


@dataclass(frozen=True)
class Change:
    """A tensor of a layer that the file has in other values, or in several parts."""

    parts: tuple[str, ...]
    """The names in a layer that `Architecture.layer` gives to the tensors of the file."""
    compute: Callable[[Fields, Sequence[torch.Tensor]], torch.Tensor]
    """The tensor as Hugging Face has it, from the tensors of the file in the order of `parts`."""


@dataclass(frozen=True)
class Architecture:
    """A model family."""

    model_class: str
    """vLLM's class, as `architectures` of config.json names it."""
    model_type: str
    """What config.json calls the family."""
    config: Callable[[Fields], dict[str, Any]]
    """The family's own part of config.json."""
    layer: Mapping[str, str]
    """The names in a layer: ggml's, and those of Hugging Face. `{}` is the number of an expert. A
    name of ggml with its suffix, such as `exp_probs_b.bias`, stands for a whole name."""
    changes: Mapping[str, Change] = field(default_factory=dict)
    """What is not stored as in Hugging Face checkpoints, by the names there, in a layer."""
    unused: tuple[str, ...] = ()
    """Tensors outside the layers that only ggml needs."""
    outside: Mapping[str, str] = field(default_factory=lambda: OUTSIDE)
    """The names outside the layers, as in `layer`."""
    gated: bool = True
    """Whether experts have a gate. Of a family without gates, any layer may lack experts."""

    def rename(self, name: str) -> str | None:
        """The Hugging Face name of a tensor, with `{}` for an expert; None if there is none."""
        place = layer_of(name)
        if place is None:
            names, prefix, own = self.outside, "", name
        else:
            names, prefix, own = self.layer, f"model.layers.{place[0]}.", place[1]
        if own in names:
            return prefix + names[own]
        stem, dot, suffix = own.rpartition(".")
        if not dot or suffix not in ("weight", "bias") or stem not in names:
            return None
        return f"{prefix}{names[stem]}.{suffix}"


def layer_of(tensor: str) -> tuple[int, str] | None:
    """The layer of a tensor with this name in the file, and the rest of the name."""
    found = _LAYER.match(tensor)
    return (int(found[1]), found[2]) if found else None
