"""How a compressed-tensors checkpoint stores each format.

A scheme has what config.json says of the format, lists the tensors that replace a weight [N, K],
and makes them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, model_validator

from lvllm.engine import quantize, weight_formats
from lvllm.export.tensorfile import ExportError, Tensor

__all__ = ["FORMATS", "GROUP_SIZE", "KEEP", "Format", "Scheme", "scheme"]

GROUP_SIZE = 32
FORMATS = ("int4", "fp8", "int8", "mxfp4", "nvfp4")
KEEP = "keep"
"""What a rule says of weights that stay as they are."""
DYNAMIC_INPUTS = {
    "num_bits": 8,
    "type": "float",
    "strategy": "token",
    "symmetric": True,
    "dynamic": True,
}


class Format(BaseModel):
    """One of FORMATS, or KEEP. It is written as a text, or as a mapping with both fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    group_size: int = GROUP_SIZE
    """For int4: how many weights along K share a scale."""

    @model_validator(mode="before")
    @classmethod
    def _of_a_text(cls, written: Any) -> Any:
        return {"format": written} if isinstance(written, str) else written

    @model_validator(mode="after")
    def _check(self) -> "Format":
        if self.format not in (*FORMATS, KEEP):
            raise ValueError(f"format {self.format} is not allowed: {', '.join(FORMATS)}, {KEEP}")
        if self.format == "int4" and self.group_size not in weight_formats.GROUP_SIZES:
            allowed = ", ".join(map(str, weight_formats.GROUP_SIZES))
            raise ValueError(f"groups of {self.group_size} are not allowed: {allowed}")
        if self.format != "int4" and self.group_size != GROUP_SIZE:
            raise ValueError(f"groups of {self.group_size} go with int4 only, not {self.format}")
        return self

    def __str__(self) -> str:
        return f"int4 in groups of {self.group_size}" if self.format == "int4" else self.format


@dataclass(frozen=True)
class Scheme:
    """A format of `lvllm export`."""

    format: str
    """The name that compressed-tensors has for it."""
    weights: Mapping[str, Any]
    """What `config_groups` says of the weights."""
    tensors: Callable[[int, int], dict[str, tuple[str, tuple[int, ...]]]]
    """The tensors for a weight [N, K]: dtype and shape by suffix, in the order of the file."""
    make: Callable[..., dict[str, torch.Tensor]]
    """Makes those tensors of a weight. It also takes `global_scale` if `shares_scale`."""
    columns: int = 1
    """K must be a multiple of this."""
    inputs: Mapping[str, Any] | None = None
    """What `config_groups` says of the activations."""
    shares_scale: bool = False
    """Whether the projections of one module share a global scale."""

    def replacements(self, weight: Tensor) -> list[Tensor]:
        """The tensors that replace `weight`. Raises ExportError if its shape does not fit."""
        rows, columns = weight.shape
        if columns % self.columns:
            raise ExportError(
                f"{weight.name} has {columns} columns, no multiple of {self.columns}, as the format"
                " wants it"
            )
        stem = weight.name.removesuffix("weight")
        return [
            Tensor(f"{stem}{suffix}", dtype, shape)
            for suffix, (dtype, shape) in self.tensors(rows, columns).items()
        ]

    def group(self, targets: list[str]) -> dict[str, Any]:
        """An entry of `config_groups` in config.json, for these modules."""
        return {
            "targets": targets,
            "weights": {"dynamic": False, "symmetric": True, **self.weights},
            "input_activations": None if self.inputs is None else dict(self.inputs),
            "output_activations": None,
            "format": self.format,
        }


def scheme(how: Format) -> Scheme:
    """The scheme of a format other than KEEP."""
    if how.format == "int4":
        return _int4(how.group_size)
    return {"fp8": FP8, "int8": INT8, "mxfp4": MXFP4, "nvfp4": NVFP4}[how.format]


def _int4(group: int) -> Scheme:
    def make(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        # compressed-tensors packs eight codes into an int32. On a little-endian machine its bytes
        # are the engine's, two codes in each.
        codes, scale = quantize.int4(weight, group)
        return {
            "weight_packed": codes.view(torch.int32),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }

    return Scheme(
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group},
        lambda n, k: {
            "weight_packed": ("I32", (n, k // 8)),
            "weight_scale": ("BF16", (n, k // group)),
            "weight_shape": ("I64", (2,)),
        },
        make,
        columns=group,
    )


def _make_int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scale = quantize.int8(weight)
    # compressed-tensors packs value + 128, which flips the sign bit.
    packed = codes.view(torch.uint8).bitwise_xor_(0x80).view(torch.int32)
    return {
        "weight_packed": packed,
        "weight_scale": scale.bfloat16().unsqueeze(-1),
        "weight_shape": torch.tensor(weight.shape),
    }


def _make_fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scale = quantize.fp8_channels(weight)
    return {"weight": codes, "weight_scale": scale.bfloat16().unsqueeze(-1)}


def _make_mxfp4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scale = quantize.mxfp4(weight)
    return {"weight_packed": codes, "weight_scale": scale}


def _make_nvfp4(weight: torch.Tensor, global_scale: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scale, _ = quantize.nvfp4(weight, global_scale)
    return {
        "weight_packed": codes,
        "weight_scale": scale,
        "weight_global_scale": global_scale.reciprocal().view(1),
    }


INT8 = Scheme(
    "pack-quantized",
    {"num_bits": 8, "type": "int", "strategy": "channel"},
    lambda n, k: {
        "weight_packed": ("I32", (n, k // 4)),
        "weight_scale": ("BF16", (n, 1)),
        "weight_shape": ("I64", (2,)),
    },
    _make_int8,
    columns=4,
)
FP8 = Scheme(
    "float-quantized",
    {"num_bits": 8, "type": "float", "strategy": "channel"},
    lambda n, k: {"weight": ("F8_E4M3", (n, k)), "weight_scale": ("BF16", (n, 1))},
    _make_fp8,
    inputs=DYNAMIC_INPUTS,
)
MXFP4 = Scheme(
    "mxfp4-pack-quantized",
    {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
    },
    lambda n, k: {"weight_packed": ("U8", (n, k // 2)), "weight_scale": ("U8", (n, k // 32))},
    _make_mxfp4,
    columns=32,
)
NVFP4 = Scheme(
    "nvfp4-pack-quantized",
    {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
    },
    lambda n, k: {
        "weight_packed": ("U8", (n, k // 2)),
        "weight_scale": ("F8_E4M3", (n, k // 16)),
        "weight_global_scale": ("F32", (1,)),
    },
    _make_nvfp4,
    columns=16,
    shares_scale=True,
)
