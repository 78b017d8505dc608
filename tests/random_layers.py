"""Random expert layers in every weight format, and their reference in plain PyTorch.

The dequantisation follows the definitions of the formats, with tables and exponents. It does not
follow the engine's code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize
from torch.nn import functional as F

from benchmarks.weights import random_blocks
from lvllm.engine import DTYPES, ExpertLayer
from lvllm.engine.weight_formats import BLOCK_FORMATS

FORMATS = tuple(DTYPES)
"""The formats but those of blocks, whose rows may have any number of weights, or any even one."""
FOUR_BIT = ("int4", "mxfp4", "nvfp4")
GATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
ACTIVATIONS = (*GATED, "swigluoai", "swiglustep", "relu2")

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The value of each of the 16 codes of e2m1."""


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Unpack uint8 [..., K/2] into codes from 0 to 15 [..., K].

    The low nibbles have the codes at even places.
    """
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def along_k(scale: torch.Tensor, group_size: int, k: int) -> torch.Tensor:
    """Repeat each scale for every weight of its group: [..., groups] becomes float32 [..., K]."""
    return scale.float().repeat_interleave(group_size, dim=-1)[..., :k]


def dequantise(
    format: str,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    group_size: int | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """Return the float32 weights [E, rows, K] of one projection.

    The tensors have the shapes that `ExpertLayer` takes.
    """
    if format in ("bf16", "fp16"):
        return weight.float()
    if format in BLOCK_FORMATS:
        kind = GGMLQuantizationType[format.upper()]
        return torch.from_numpy(np.stack([dequantize(expert, kind) for expert in weight.numpy()]))
    assert scale is not None
    if format == "int8":
        if scale.dim() == 2:
            return weight.float() * scale[..., None]
        assert group_size is not None
        return weight.float() * along_k(scale, group_size, weight.shape[2])
    if format == "fp8":
        rows, k = weight.shape[1:]
        if scale.dim() == 3:
            blocks = along_k(scale, 128, k)
            return weight.float() * blocks.repeat_interleave(128, dim=1)[:, :rows]
        return weight.float() * (scale[..., None] if scale.dim() == 2 else scale[:, None, None])
    codes = nibbles(weight)
    rows, k = codes.shape[1:]
    if format == "mxfp4":
        return E2M1[codes.int()] * along_k(torch.exp2(scale.float() - 127), 32, k)
    if format == "nvfp4":
        assert global_scale is not None
        per_row = global_scale.view(len(weight), -1)
        parts = per_row.shape[1]
        per_row = (
            per_row.repeat(1, rows // parts)
            if interleaved
            else per_row.repeat_interleave(rows // parts, dim=1)
        )
        return E2M1[codes.int()] * along_k(scale, 16, k) * per_row[..., None]
    group = group_size if group_size not in (None, -1) else k
    assert group is not None
    scale = scale.view(*codes.shape[:2], -1)
    middle = 8.0 if zero is None else along_k(zero.view(scale.shape), group, k)
    return (codes.float() - middle) * along_k(scale, group, k)


@dataclass
class Layer:
    """The arguments of an `ExpertLayer`, and a reference that computes what it should make of them.

    The function `dequantise` decides what the weights mean.
    """

    arguments: dict[str, Any]

    def make(self, **changes: Any) -> ExpertLayer:
        """Make the engine's layer from copies of the tensors, since it permutes what it gets."""
        arguments = self.arguments | changes
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                arguments[name] = value.clone()
        return ExpertLayer(**arguments)

    def dequantised(self, name: str) -> torch.Tensor:
        """The float32 weights of "w13" or "w2". Their rows keep the order they were given in.

        Up rows in w3 follow those of w13.
        """
        if name == "w13" and "w3" in self.arguments:
            return torch.cat((self._stored("w13"), self._stored("w3")), dim=1)
        return self._stored(name)

    def _stored(self, name: str) -> torch.Tensor:
        a = self.arguments
        format = a.get(f"{name}_format", a["format"])
        return dequantise(
            format,
            a[name],
            a.get(f"{name}_scale"),
            a.get(f"{name}_zero"),
            a.get(f"{name}_global_scale"),
            a.get("group_size"),
            a.get("interleaved", False) and name == "w13",
        )

    def reference(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Compute the expert block [M, H] in `dtype`, on dequantised weights.

        `x` is [M, H]. `ids` and `weights` are the experts and router weights, [M, top-k].
        """
        w13, w2 = self.dequantised("w13").to(dtype), self.dequantised("w2").to(dtype)
        biases = self.arguments.get("w13_bias"), self.arguments.get("w2_bias")
        on_input = self.arguments.get("apply_router_weight_on_input", False)
        out = torch.zeros(x.shape, dtype=dtype)
        for expert in range(len(w13)):
            token, slot = torch.where(ids == expert)
            if not len(token):
                continue
            weight = weights[token, slot, None].to(dtype)
            h = x[token].to(dtype) * (weight if on_input else 1)
            b13, b2 = (None if b is None else b[expert].to(dtype) for b in biases)
            y = F.linear(self.activated(F.linear(h, w13[expert], b13)), w2[expert], b2)
            out.index_add_(0, token, y if on_input else y * weight)
        return out

    def activated(self, h: torch.Tensor) -> torch.Tensor:
        """Apply the activation to [M, rows of w13]; the result is [M, I]."""
        name = self.arguments.get("activation", "silu")
        if name == "relu2":
            return h.relu().square()
        interleaved = self.arguments.get("interleaved", False)
        gate, up = (h[:, 0::2], h[:, 1::2]) if interleaved else h.chunk(2, dim=-1)
        if name in GATED:
            return GATED[name](gate) * up
        limit = self.arguments.get("swiglu_limit", 7.0)
        up = up.clamp(-limit, limit)
        if name == "swiglustep":
            return F.silu(gate).clamp(max=limit) * up
        gate = gate.clamp(max=limit)
        alpha = self.arguments.get("swiglu_alpha", 1.702)
        return (up + self.arguments.get("swiglu_beta", 1.0)) * gate * torch.sigmoid(alpha * gate)


@dataclass
class Random:
    """Random tensors that are drawn from one seed."""

    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self.generator) * (high - low) + low

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator)


def random_projection(
    random: Random,
    name: str,
    format: str,
    experts: int,
    rows: int,
    k: int,
    *,
    parts: int = 1,
    fp8_scale: str = "block",
    group_size: int | None = None,
    zero: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """Draw the tensors of one projection. Its outputs are about as large as its inputs."""
    size = k**-0.5
    if format in ("bf16", "fp16"):
        return {name: (random.normal(experts, rows, k) * size).to(DTYPES[format])}
    if format in BLOCK_FORMATS:
        count = experts * rows * k // BLOCK_FORMATS[format].block_weights
        blocks = random_blocks(format, count, size, random.generator)
        return {name: blocks.view(experts, rows, -1)}
    scale = f"{name}_scale"
    if format == "int8":
        codes = {name: random.integers(-128, 128, experts, rows, k).to(torch.int8)}
        if group_size in (None, -1):
            return codes | {scale: random.uniform(0.5, 1.5, experts, rows) * size / 74}
        assert group_size is not None
        drawn = random.uniform(0.5, 1.5, experts, rows, -(-k // group_size))
        return codes | {scale: (drawn * size / 74).to(scale_dtype)}
    if format == "fp8":
        shape = {
            "block": (experts, -(-rows // 128), -(-k // 128)),
            "channel": (experts, rows),
            "tensor": (experts,),
        }[fp8_scale]
        return {
            name: (random.normal(experts, rows, k) * 60).to(torch.float8_e4m3fn),
            scale: random.uniform(0.5, 1.5, *shape) * size / 60,
        }
    packed = {name: random.integers(0, 256, experts, rows, k // 2).to(torch.uint8)}
    if format == "mxfp4":
        exponent = round(torch.tensor(size / 3).log2().item()) + 127
        shape = (experts, rows, -(-k // 32))
        return packed | {scale: random.integers(exponent - 2, exponent + 2, *shape).to(torch.uint8)}
    if format == "nvfp4":
        shape = (experts, rows, -(-k // 16))
        of_parts = (experts, parts) if name == "w13" else (experts,)
        return packed | {
            scale: random.uniform(2, 60, *shape).to(torch.float8_e4m3fn),
            f"{name}_global_scale": random.uniform(0.5, 1.5, *of_parts) * size / 90,
        }
    group_size = 32 if group_size is None else group_size
    shape = (experts, rows, 1 if group_size == -1 else -(-k // group_size))
    tensors = packed | {scale: (random.uniform(0.5, 1.5, *shape) * size / 5).to(scale_dtype)}
    if zero:
        tensors[f"{name}_zero"] = random.integers(0, 16, *shape).to(torch.uint8)
    return tensors


def random_layer(
    random: Random,
    format: str,
    experts: int,
    hidden: int,
    intermediate: int,
    *,
    w2_format: str | None = None,
    w3_format: str | None = None,
    activation: str = "silu",
    bias: bool = False,
    bias_dtype: torch.dtype = torch.bfloat16,
    group_size: int | None = None,
    fp8_scale: str = "block",
    zero: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
    **arguments: Any,
) -> Layer:
    """Make a layer of random weights. Further arguments go to `ExpertLayer`.

    Without a group size, int4 has groups of 32, and each row of int8 one scale.
    """
    parts = 1 if activation == "relu2" or w3_format is not None else 2
    rows = parts * intermediate
    how: dict[str, Any] = {
        "fp8_scale": fp8_scale,
        "group_size": group_size,
        "zero": zero,
        "scale_dtype": scale_dtype,
    }
    tensors = random_projection(
        random, "w13", format, experts, rows, hidden, parts=parts, **how
    ) | random_projection(random, "w2", w2_format or format, experts, hidden, intermediate, **how)
    if w3_format is not None:
        tensors |= random_projection(random, "w3", w3_format, experts, rows, hidden, **how)
        arguments["w3_format"] = w3_format
    if bias:
        tensors["w13_bias"] = random.normal(experts, rows).to(bias_dtype)
        tensors["w2_bias"] = random.normal(experts, hidden).to(bias_dtype)
    if w2_format is not None:
        arguments["w2_format"] = w2_format
    if "int4" in (format, w2_format, w3_format):
        arguments["group_size"] = 32 if group_size is None else group_size
    elif "int8" in (format, w2_format, w3_format):
        arguments["group_size"] = group_size
    return Layer({"format": format, "activation": activation} | tensors | arguments)
