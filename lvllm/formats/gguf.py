"""GGUF files: blocks of weights with their scales, whose type each tensor chooses for itself.

`TYPES` has, for each of ggml's types that lk computes, how a row of blocks is held in memory. lk
wants integers and scales apart where it knows the format from elsewhere, so that blocks of these
types are taken apart as they arrive. The other types are blocks for lk, too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module

from lvllm.checkpoint.gguf.architecture import EXPERTS
from lvllm.checkpoint.gguf.architectures import METHOD
from lvllm.checkpoint.headers import CheckpointError, TensorInfo
from lvllm.checkpoint.moe_layers import layer_number
from lvllm.engine.weight_formats import BLOCK_FORMATS, GROUPED
from lvllm.formats.base import ExpertFormat, Shape, add_parameter, wrong_shape
from lvllm.formats.descriptor import PLAIN, Descriptor, Section, Stored

__all__ = ["DESCRIPTOR", "TYPES", "Gguf", "Held", "check_types", "find", "held"]

Split = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Takes blocks apart: uint8 [rows, blocks, bytes of a block] -> codes [rows, ...] as lk has them,
and scales [rows, blocks]."""


Factors = Callable[[torch.Tensor], torch.Tensor]
"""uint8 [rows, blocks, bytes of a block] -> float16."""


@dataclass(frozen=True)
class Held:
    """How lk holds the experts of one of ggml's types."""

    format: str | None
    """lk's format; None: that of the model's dtype."""
    bits: int
    """Of a weight, without its share of the scales."""
    weights: int
    """In a block."""
    nbytes: int
    """Of a block."""
    dtype: torch.dtype | None = torch.uint8
    """Of the weights in memory; None: the model's."""
    width: int = 0
    """Elements of `dtype` that a block takes in memory; 0: as many as in the file."""
    split: Split | None = None
    """None: the blocks stay as they are in the file."""
    scale: torch.dtype = torch.float16
    """Of the scales, if the blocks are taken apart."""
    factors: Factors | None = None
    """The numbers in float16 of blocks that stay as they are."""

    @property
    def is_raw(self) -> bool:
        """Whether the file has blocks of bytes, and not plain numbers."""
        return self.weights > 1

    @property
    def memory_bits(self) -> float:
        """Bits that a weight takes in memory, with its share of the scales."""
        return 8 * self.nbytes / self.weights if self.is_raw else self.bits

    def columns(self, weights: int) -> int:
        """Elements of the file's tensor that hold so many weights of a row."""
        return weights // self.weights * self.nbytes if self.is_raw else weights

    def elements(self, weights: int) -> int:
        """Elements of the memory that hold so many weights of a row."""
        return weights // self.weights * self.width if self.width else self.columns(weights)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Neighbours in one byte, as lk has them: uint8 [rows, blocks, 16] -> [rows, blocks * 16].

    A block of ggml has its first 16 weights in the low halves of its bytes, and the others in the
    high halves.
    """
    halves = torch.cat((packed & 15, packed >> 4), -1)
    return (halves[..., ::2] | halves[..., 1::2] << 4).flatten(1)


def _q8_0(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    return blocks[..., 2:].flatten(1).view(torch.int8), scale


def _q4_0(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    return _nibbles(blocks[..., 2:]), scale


def _mxfp4(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _nibbles(blocks[..., 1:]), blocks[..., 0]


def _at(*places: int) -> Factors:
    """Numbers at these bytes of a block."""
    where = [byte for at in places for byte in (at, at + 1)]
    return lambda blocks: blocks[..., where].view(torch.float16)


def _in_quarters(blocks: torch.Tensor) -> torch.Tensor:
    """IQ1_M has its number in the high four bits of its last four words of 16 bits."""
    quarters = blocks[..., 49::2].to(torch.int32) >> 4
    return (quarters << torch.arange(0, 16, 4)).sum(-1).to(torch.int16).view(torch.float16)


def _blocks(format: str, bits: int, factors: Factors) -> Held:
    """Blocks that lk computes as they are in the file."""
    stored = BLOCK_FORMATS[format]
    return Held(format, bits, stored.block_weights, stored.block_bytes, factors=factors)


TYPES: dict[str, Held] = {
    "Q8_0": Held("int8", 8, 32, 34, torch.int8, width=32, split=_q8_0),
    "Q4_0": Held("int4", 4, 32, 18, width=16, split=_q4_0),
    "MXFP4": Held("mxfp4", 4, 32, 17, width=16, split=_mxfp4, scale=torch.uint8),
    "Q2_K": _blocks("q2_k", 2, _at(80, 82)),
    "Q3_K": _blocks("q3_k", 3, _at(108)),
    "Q4_K": _blocks("q4_k", 4, _at(0, 2)),
    "Q5_K": _blocks("q5_k", 5, _at(0, 2)),
    "Q6_K": _blocks("q6_k", 6, _at(208)),
    "Q4_1": _blocks("q4_1", 4, _at(0, 2)),
    "Q5_0": _blocks("q5_0", 5, _at(0)),
    "Q5_1": _blocks("q5_1", 5, _at(0, 2)),
    "IQ4_NL": _blocks("iq4_nl", 4, _at(0)),
    "IQ4_XS": _blocks("iq4_xs", 4, _at(0)),
    "IQ1_S": _blocks("iq1_s", 1, _at(0)),
    "IQ1_M": _blocks("iq1_m", 1, _in_quarters),
    "IQ2_XXS": _blocks("iq2_xxs", 2, _at(0)),
    "IQ2_XS": _blocks("iq2_xs", 2, _at(0)),
    "IQ2_S": _blocks("iq2_s", 2, _at(0)),
    "IQ3_XXS": _blocks("iq3_xxs", 3, _at(0)),
    "IQ3_S": _blocks("iq3_s", 3, _at(0)),
    "F16": Held("fp16", 16, 1, 2, torch.float16),
    "BF16": Held("bf16", 16, 1, 2, torch.bfloat16),
    "F32": Held(None, 16, 1, 4, None),
}
"""ggml's types of routed experts that are served."""
GROUP = 32
"""The group size of int8 and int4, which may have others."""


@dataclass(frozen=True)
class StoredBlocks(Stored):
    """How the weights of one module are stored, and the size of a block."""

    weights: int = 1
    nbytes: int = 2


def types_of(section: Section, module: str) -> tuple[str, str, str] | None:
    """ggml's types of the experts (gate, up, down) in the layer of a module, by config.json.

    None: the layer has no routed experts.
    """
    number = layer_number(module)
    types = section.get("experts", {}).get(str(number))
    return None if types is None else (types[0], types[1], types[2])


def check_types(config: Section, where: str) -> None:
    """Check that lk computes all routed experts.

    Args:
        config: config.json, whose `quantization_config` has the types.
        where: the name of the file, for the error.

    Raises:
        CheckpointError: in one line, with the tensor, its type and what is allowed.
    """
    for layer, types in config["quantization_config"]["experts"].items():
        # Without a gate, its type is that of up.
        for name, kind in sorted(
            zip(EXPERTS, types, strict=True), key=lambda one: "gate" in one[0]
        ):
            if kind not in TYPES:
                raise CheckpointError(
                    f"{where}: tensor 'blk.{layer}.{name}.weight': experts of the type {kind} are"
                    f" not served; served are {', '.join(TYPES)}"
                )
        # vLLM's model takes a row of gate and of up in turn.
        if types[1] != types[0] and config.get("model_type") == "gpt_oss":
            raise CheckpointError(
                f"{where}: tensor 'blk.{layer}.{EXPERTS[1]}.weight': is {types[1]}, and"
                f" {EXPERTS[0]} is {types[0]}: gate and up of gpt-oss must have one type"
            )


def _stored(section: Section, module: str) -> Stored:
    types = types_of(section, module)
    if types is None or ".experts." not in module:
        return PLAIN
    projection = module.rpartition(".")[2]
    number = 2 if projection in ("down_proj", "w2") else projection in ("up_proj", "w3")
    held = TYPES.get(types[number])
    if held is None:
        return Stored(8, computable=False)
    return StoredBlocks(held.bits, weights=held.weights, nbytes=held.nbytes)


def _weights_in(tensor: TensorInfo, stored: Stored) -> int:
    """The number of weights in an expert's tensor."""
    held = stored if isinstance(stored, StoredBlocks) else StoredBlocks(stored.bits)
    return tensor.nbytes // held.nbytes * held.weights


DESCRIPTOR = Descriptor(
    "GGUF",
    stored=_stored,
    quantizations=(METHOD,),
    quant_methods=(METHOD,),
    weights_in=_weights_in,
)


def find(quant_config: Any, layer: Any, prefix: str) -> "Gguf | None":
    """Experts of a GGUF file, whose types vLLM's configuration has from config.json."""
    return Gguf(*held(quant_config, prefix)) if DESCRIPTOR.describes(quant_config) else None


def held(quant_config: Any, prefix: str) -> tuple[Held, Held, Held]:
    """How the experts of the layer `prefix` are held: gate, up and down."""
    types = types_of(quant_config.section, prefix)
    if types is None:
        raise ValueError(f"{prefix}: the GGUF file has no experts for this layer")
    gate, up, down = types
    return TYPES[gate], TYPES[up], TYPES[down]


class Gguf(ExpertFormat):
    """w13_weight [E, 2I, ...] (gate rows, then up rows) and w2_weight [E, H, ...], as `Held` says.

    If gate and up are held differently, w13_weight has the gate rows alone, and its loader puts the
    up rows into memory beside it.

    Args:
        gate: how gate is held; without a gate, how up is.
        up: how up is held.
        down: how down is held.
    """

    together = False
    """Whether gate and up come as one tensor, a row of each in turn."""

    def __init__(self, gate: Held, up: Held, down: Held) -> None:
        self.held = {"w13": gate, "w2": down}
        if up is not gate:
            self.held["w3"] = up
        self.bits = max(held.bits for held in self.held.values())
        self.memory: dict[str, torch.Tensor] = {}
        self.scales: dict[str, torch.Tensor] = {}

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        for name, parts, rows, columns in self._matrices(shape):
            held = self.held[name]
            if columns % held.weights:
                raise ValueError(
                    f"{name} has {columns} columns in this process, and blocks of {held.weights}"
                )
            size = (shape.experts, rows, held.elements(columns))
            memory = shape.allocate(size, held.dtype or dtype, parts=parts)
            if held.split is not None:
                scale_size = (shape.experts, rows, columns // held.weights)
                self.scales[name] = torch.empty(scale_size, dtype=held.scale)
            self.memory[name] = memory
        for name, parts, rows, columns in shape.matrices:
            of_tensor = rows if self.together else rows // parts
            place = self._placing(layer, name, of_tensor, columns)
            add_parameter(layer, f"{name}_weight", self.memory[name], attributes, place=place)

    def _matrices(self, shape: Shape) -> list[tuple[str, int, int, int]]:
        """`Shape.matrices` of what is held, with w3 if gate and up are held differently."""
        matrices = list(shape.matrices)
        if "w3" not in self.held:
            return matrices
        of_one = (1, shape.intermediate, shape.hidden)
        return [("w13", *of_one), ("w3", *of_one), *matrices[1:]]

    def _placing(self, layer: Any, name: str, rows: int, columns: int) -> Callable[..., None]:
        """The function that copies an expert's tensor to its place.

        `rows` and `columns` are the numbers of weights that this process has of the tensor.
        """
        rank, ranks = layer.moe_config.tp_rank, layer.moe_config.moe_parallel_config.tp_size

        def refuse_any(bad: torch.Tensor) -> None:
            if bad.any():
                raise ValueError(f"{int(bad.sum())} of its scales are NaN or infinite")

        def place(data: torch.Tensor, expert: int, loaded: torch.Tensor, shard: str) -> None:
            own_up = shard == "w3" and "w3" in self.held
            matrix = "w3" if own_up else name
            held = self.held[matrix]
            size = (rows, held.columns(columns))
            divided = 1 if name == "w2" else 0
            wanted = list(size)
            wanted[divided] *= ranks
            if list(loaded.shape) != wanted:
                raise ValueError(wrong_shape(loaded.shape, wanted))
            here = loaded.narrow(divided, rank * size[divided], size[divided])
            first = rows if shard == "w3" and not own_up else 0
            to = (self.memory["w3"] if own_up else data)[expert, first : first + rows]
            if held.split is None:
                to.copy_(here)
                if held.factors is not None:
                    refuse_any(~held.factors(to.unflatten(1, (-1, held.nbytes))).isfinite())
                return
            blocks = torch.empty(size, dtype=torch.uint8)
            blocks.copy_(here)
            codes, scale = held.split(blocks.view(rows, -1, held.nbytes))
            refuse_any(scale == 255 if scale.dtype == torch.uint8 else ~scale.isfinite())
            to.copy_(codes)
            self.scales[matrix][expert, first : first + rows].copy_(scale)

        return place

    def tensors(self, layer: Any) -> dict[str, Any]:
        own = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        weights, self.memory = self.memory, {}
        formats = {
            name: held.format or own[weights[name].dtype] for name, held in self.held.items()
        }
        scales = {f"{name}_scale": scale for name, scale in self.scales.items()}
        self.scales = {}
        found: dict[str, Any] = {"format": formats["w13"], **weights, **scales}
        if formats["w2"] != formats["w13"]:
            found["w2_format"] = formats["w2"]
        if "w3" in formats:
            found["w3_format"] = formats["w3"]
        if any(format in GROUPED for format in formats.values()):
            found["group_size"] = GROUP
        return found
