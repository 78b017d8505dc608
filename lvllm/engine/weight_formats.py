"""How each weight format is stored, and the checks of the tensors that hold it.

A check raises ValueError with one line, which names the argument, its value and what is wanted.
"""

from __future__ import annotations

import os
import string
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lvllm.units import ceil_div

BLOCK = 128
"""Rows and columns that share one scale in blockwise fp8."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of a format are stored."""

    weight: torch.dtype
    values: int = 1
    """How many weights an element holds: 2 in 4-bit formats, with the even K in the low nibble."""
    scale: tuple[torch.dtype, ...] = ()
    """The dtypes that scales may have; empty where the format has no scales."""
    group_size: int | None = None
    """The group size, if the format has only one."""
    activation_bits: tuple[int, ...] = (16,)
    """The numbers of bits that activations may have; the default is the first one.

    It is 8 if that adds less than a tenth to the KL divergence that the format's weights cost by
    themselves. What benchmarks/activation_bits.py measured that 8 bits add stands beside each.
    """
    block_bytes: int = 0
    """Bytes of a block of weights with their scales, in formats of blocks."""
    block_weights: int = 256
    """How many weights a block has."""

    def columns(self, elements: int) -> int:
        """How many weights so many elements of a row hold."""
        if self.block_bytes:
            return elements // self.block_bytes * self.block_weights
        return elements * self.values

    def elements(self, columns: int) -> int:
        """How many elements of a row hold so many weights."""
        if self.block_bytes:
            return columns // self.block_weights * self.block_bytes
        return columns // self.values

    @property
    def unit(self) -> int:
        """A row has a multiple of so many weights."""
        return self.block_weights if self.block_bytes else self.values


FORMATS = {
    "bf16": WeightFormat(torch.bfloat16),
    "fp16": WeightFormat(torch.float16),
    "fp8": WeightFormat(torch.float8_e4m3fn, scale=(torch.float32,)),
    "int8": WeightFormat(torch.int8, scale=FLOATS, activation_bits=(16, 8)),  # +146%
    "int4": WeightFormat(torch.uint8, 2, FLOATS, activation_bits=(8, 16)),  # +0.6% to +2.0%
    "mxfp4": WeightFormat(  # +1.2%
        torch.uint8, 2, (torch.uint8,), group_size=32, activation_bits=(8, 16)
    ),
    "nvfp4": WeightFormat(  # +0.6%
        torch.uint8, 2, (torch.float8_e4m3fn,), group_size=16, activation_bits=(8, 16)
    ),
}


def _blocks(nbytes: int, bits: tuple[int, ...] = (8, 16), weights: int = 256) -> WeightFormat:
    return WeightFormat(
        torch.uint8, activation_bits=bits, block_bytes=nbytes, block_weights=weights
    )


BLOCK_FORMATS = {
    "q2_k": _blocks(84),  # +0.0%
    "q3_k": _blocks(110),  # +0.1%
    "q4_k": _blocks(144),  # +0.9%
    "q5_k": _blocks(176),  # +3.6%
    "q6_k": _blocks(210, (16, 8)),  # +10.3%
    "q4_1": _blocks(20, weights=32),  # +0.5%
    "q5_0": _blocks(22, weights=32),  # +1.6%
    "q5_1": _blocks(24, weights=32),  # +2.0%
    "iq4_nl": _blocks(18, weights=32),
    "iq4_xs": _blocks(136),
    "iq1_s": _blocks(50),
    "iq1_m": _blocks(56),
    "iq2_xxs": _blocks(66),
    "iq2_xs": _blocks(74),
    "iq2_s": _blocks(82),
    "iq3_xxs": _blocks(98),
    "iq3_s": _blocks(110),
}
"""Types of GGUF, as a file stores them: uint8 [E, rows, bytes], with scales and minimums
among the weights. Beside some stands what 8-bit activations add to the squared error of a layer
whose normally distributed weights ggml has quantised, to which KL divergences are proportional. The
others have at most the bits of Q4_K, so it is no more for them."""
ALL_FORMATS = FORMATS | BLOCK_FORMATS
ACTIVATION_BITS = "LK_ACTIVATION_BITS"
"""The variable that chooses between activations of 8 and of 16 bits, or leaves it to the format."""

GROUPED = ("int4", "int8")
"""The formats whose groups have one of several sizes."""
GROUP_SIZES = (32, 64, 128)
"""The group sizes of int4 and int8. Alternatively, each row has one scale."""

DTYPES = {name: stored.weight for name, stored in FORMATS.items()}
"""The dtype of the weights in each format that the engine computes."""


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError unless the argument called `name` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, must be one of {', '.join(map(str, allowed))}")


def activation_bits(format: str, given: int | None) -> int:
    """The number of bits of a layer's activations.

    If no number is given, the variable LK_ACTIVATION_BITS decides, as LK_ISA decides the
    instruction set. Both variables also work for the engine without vLLM. Without the variable or
    with `auto`, the format's default is taken.

    Raises ValueError if the format does not allow the number, or if the variable is not auto, 8 or
    16.
    """
    if given is not None:
        allowed = ALL_FORMATS[format].activation_bits
        check_choice(f"activation_bits of format {format}", given, allowed)
        return given
    written = os.environ.get(ACTIVATION_BITS, "").strip(string.whitespace) or "auto"
    if written not in ("auto", "8", "16"):
        raise ValueError(f"{ACTIVATION_BITS}={written!r} is not allowed: auto, 8 or 16")
    return preferred_activation_bits(format, None if written == "auto" else int(written))


def preferred_activation_bits(format: str, wanted: int | None) -> int:
    """The number of bits of a layer's activations, if one setting applies to layers of all formats.

    A format that allows only 16 bits ignores the setting. None stands for the format's default.
    """
    allowed = ALL_FORMATS[format].activation_bits
    return wanted if wanted in allowed else allowed[0]


def group_size(format: str, given: int | None, largest: int) -> int:
    """The group size for the engine: `largest` if each row is one group, 0 without groups."""
    if format not in GROUPED:
        fixed = ALL_FORMATS[format].group_size
        if given not in (None, fixed):
            raise ValueError(
                f"group_size is {given}, but format {format} has "
                + (f"groups of {fixed}" if fixed else "no groups")
            )
        return fixed or 0
    if given in (None, -1):
        return largest if format == "int4" else 0
    check_choice("group_size", given, (*GROUP_SIZES, -1))
    assert given is not None
    return given


def group_size_of(formats: tuple[str, str, str], given: int | None, largest: int) -> int:
    """The group size of a layer with these formats of w13, w2 and w3, as `group_size` has it.

    Raises ValueError if several have groups, of different sizes.
    """
    alike = len(set(formats)) == 1
    sizes = {
        group_size(format, given if alike or format in GROUPED else None, largest)
        for format in formats
    } - {0}
    if len(sizes) > 1:
        others = dict.fromkeys(format for format in formats[1:] if format != formats[0])
        raise ValueError(
            f"format is {formats[0]!r}, but those of other projections, {', '.join(others)}, have"
            " groups of another size"
        )
    return max(sizes, default=0)


def check_scale(
    name: str,
    scale: torch.Tensor | None,
    format: str,
    shape: tuple[int, int, int],
    group: int,
) -> torch.Tensor | None:
    """Check a scale, and return it in the engine's shape.

    The shape is the one given, except where each row of int4 has one scale: [E, rows, 1].
    """
    dtypes = ALL_FORMATS[format].scale
    check_presence(name, scale, format, wanted=bool(dtypes))
    if scale is None:
        return None
    experts, rows, columns = shape
    shapes: tuple[tuple[int, ...], ...]
    if format == "fp8":
        blocks = (experts, ceil_div(rows, BLOCK), ceil_div(columns, BLOCK))
        shapes = (blocks, (experts, rows), (experts,))
    elif format == "int8" and not group:
        dtypes, shapes = (torch.float32,), ((experts, rows),)
    else:
        shapes = ((experts, rows, ceil_div(columns, group)),)
        if format == "int4" and shapes[0][2] == 1:
            shapes = (*shapes, (experts, rows))
    check_tensor(name, scale, dtypes, shapes)
    return scale.unsqueeze(-1) if group and scale.dim() == 2 else scale


def check_zero(
    name: str, zero: torch.Tensor | None, format: str, scale: torch.Tensor | None
) -> torch.Tensor | None:
    if zero is None:
        return None
    if format != "int4" or scale is None:
        raise ValueError(f"{name} was given, but format {format} has no zero points")
    shape = tuple(scale.shape)
    check_tensor(name, zero, (torch.uint8,), (shape, shape[:2]) if shape[2] == 1 else (shape,))
    return zero.view(shape)


def check_presence(name: str, tensor: torch.Tensor | None, format: str, *, wanted: bool) -> None:
    if tensor is None and wanted:
        raise ValueError(f"{name} is missing, format {format} wants it")
    if tensor is not None and not wanted:
        raise ValueError(f"{name} was given, but format {format} has none")


def check_weights(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dim() != 3 or 0 in tensor.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted [experts, rows, columns]")
    check_tensor(name, tensor, (dtype,), (tuple(tensor.shape),))


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[tuple[int, ...]],
) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, wanted {' or '.join(map(str, dtypes))}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}, wanted the CPU")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is {tensor.layout}, wanted a dense tensor")
    if tuple(tensor.shape) not in shapes:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, wanted {' or '.join(map(str, shapes))}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, wanted a contiguous tensor")
