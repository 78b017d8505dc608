"""What LvLLM knows of a checkpoint format before it reads a weight: names, tensors, bits.

A `Descriptor` needs only `quantization_config` of config.json and the headers of the files. So it
serves a planner that has nothing else, and this module imports no vLLM.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lvllm import patterns
from lvllm.checkpoint.headers import CheckpointError, TensorInfo
from lvllm.formats.section import pattern_of

__all__ = ["PLAIN", "Descriptor", "Section", "Stored", "names_module", "union"]

Section = Mapping[str, Any]
"""`quantization_config` of config.json."""

WEIGHTS = ("weight", "_proj", ".w1", ".w2", ".w3")
"""How names of tensors with weights end in any format. The endings other than "weight" are those of
model families that stack the experts of a layer in one tensor, such as `experts.gate_up_proj`.
"""


@dataclass(frozen=True)
class Stored:
    """How the weights of one module are stored."""

    bits: int
    """How many bits a weight takes, without its share of the scales."""
    computable: bool = True
    """Whether lk computes the weights as they are stored. If not, they are converted."""


PLAIN = Stored(bits=16)
"""The weights of a module that is not quantised."""


def _weights_in(tensor: TensorInfo, stored: Stored) -> int:
    """A floating-point element is one weight; an integer holds as many weights as fit into it.

    Integers never hold 16-bit weights. Where `stored` has 16 bits nevertheless, the section does
    not describe the module, and 8 bits are assumed, so that the sum is rather too low.
    """
    elements = math.prod(tensor.shape)
    if tensor.dtype.is_floating_point:
        return elements
    return elements * (8 * tensor.dtype.itemsize // min(stored.bits, 8))


@dataclass(frozen=True)
class Descriptor:
    """What distinguishes the checkpoints of one format."""

    name: str
    """What error messages call the format."""
    stored: Callable[[Section, str], Stored]
    """Says how a module's weights are stored, from the section and the module's name.

    It is not asked about modules that are listed under `exceptions`.
    """
    quantizations: tuple[str, ...] = ()
    """What vLLM calls the format: in `--quantization`, and in `get_name()` of its configuration."""
    quant_methods: tuple[str, ...] = ()
    """What `quant_method` of the section says."""
    exceptions: tuple[str, ...] = ()
    """Keys of the section that list exceptions; `a.b` is the key b of the mapping a.

    A listed module is not quantised. If the key holds a mapping, and the module's entry in it is
    not empty, the entry replaces values of the section for this module instead.
    """
    weights: tuple[str, ...] = ()
    """How names of tensors with weights end, in addition to `WEIGHTS`."""
    scales: tuple[str, ...] = ("scale",)
    """How names of tensors with scales end."""
    input_scales: tuple[str, ...] = ()
    """The scales of activations among them. LvLLM does not use their values, and does not check
    them: calibration may have left an expert out.
    """
    divisors: tuple[str, ...] = ()
    """The scales among them that weights are divided by, so that they must not be 0."""
    weights_in: Callable[[TensorInfo, Stored], int] = _weights_in
    """Counts the weights in a tensor that `holds_weights`."""

    def describes(self, quant_config: Any) -> bool:
        """Whether vLLM's configuration of a quantised checkpoint is of this format."""
        return quant_config is not None and quant_config.get_name() in self.quantizations

    def of_module(self, section: Section, module: str) -> Stored:
        """How the weights of `module`, named as in the checkpoint, are stored."""
        for key in self.exceptions:
            listed = _at(section, key)
            for entry in listed or ():
                if not names_module(entry, module):
                    continue
                replaced = listed[entry] if isinstance(listed, Mapping) else None
                # As in vLLM, the first entry that names a module is the one that counts.
                return self.stored({**section, **replaced}, module) if replaced else PLAIN
        return self.stored(section, module)

    def holds_weights(self, tensor: str) -> bool:
        """Whether an expert's tensor of this name holds weights, and not scales or the like."""
        return tensor.endswith(WEIGHTS + self.weights)


def union(suffixes: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """All suffixes, each once, in order."""
    return tuple(dict.fromkeys(suffix for some in suffixes for suffix in some))


def _at(section: Section, key: str) -> Any:
    value: Any = section
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def names_module(entry: str, module: str) -> bool:
    """Whether an entry of a list of modules means this one, in any format's notation.

    An entry is a module's name, a beginning of it, a shell pattern, or after `re:`, `-:` or `+:` a
    regular expression for its beginning. Raises CheckpointError for one that cannot be used.
    """
    if (pattern := pattern_of(entry)) is not None:
        try:
            return patterns.begins(pattern, module)
        except patterns.PatternError as error:
            raise CheckpointError(f"config.json: quantization_config: {error}") from None
    return entry == module or module.startswith(f"{entry}.") or fnmatchcase(module, entry)
