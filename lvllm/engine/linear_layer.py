"""A linear layer on the engine."""

from __future__ import annotations

import weakref

import torch

from lvllm.engine import bank, quantize, weight_formats
from lvllm.engine.ops import raw_ops

__all__ = ["OWN_FORMAT", "LinearLayer"]

OWN_FORMAT = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""The format of weights that stay as they are."""


class LinearLayer:
    """A matrix [N, K] that tokens are multiplied with: y = x W^T.

    The weights are copied into the engine's memory, each row on the NUMA node that computes it, in
    the engine's order. A token's result depends on neither its batch nor threads.

    Args:
        weight: [N, K] bfloat16 or float16 on the CPU.
        format: "bf16" or "fp16" for the weight's own dtype, or "int8", to which the weight is
            rounded with a scale for each row.
        activation_bits: as of `ExpertLayer`.

    Raises:
        ValueError: for a wrong dtype, shape or format. The text names the argument, its value and
            what is wanted.
        MemoryError: if there is too little memory.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        *,
        format: str,
        activation_bits: int | None = None,
    ) -> None:
        weight_formats.check_choice("the weight's dtype", weight.dtype, tuple(OWN_FORMAT))
        weight_formats.check_choice("format", format, (OWN_FORMAT[weight.dtype], "int8"))
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, wanted [rows, columns]")
        if weight.device.type != "cpu":
            raise ValueError(f"weight is on {weight.device}, wanted the CPU")
        if weight.layout != torch.strided:
            raise ValueError(f"weight is {weight.layout}, wanted a dense tensor")
        self.format = format
        self.activation_bits = weight_formats.activation_bits(format, activation_bits)
        self.rows, self.columns = weight.shape
        stored = bank.allocate((1, *weight.shape), weight_formats.FORMATS[format].weight)
        # The engine keeps only pointers, so this keeps the memory alive.
        self._tensors = {"w": stored}
        if format == "int8":
            codes, scale = quantize.int8(weight)
            stored[0].copy_(codes)
            self._tensors["w_scale"] = scale[None]
        else:
            stored[0].copy_(weight)
        handle: int = raw_ops.linear_create(
            format=format,
            activation_bits=self.activation_bits,
            group_size=0,
            k=self.columns,
            names=list(self._tensors),
            tensors=list(self._tensors.values()),
        )
        self.handle = torch.tensor(handle, dtype=torch.int64, device="cpu")
        """int64 scalar that identifies the layer for `torch.ops.lvllm.linear`."""
        # The engine must forget the layer before the tensors are freed.
        self._finalizer = weakref.finalize(self, raw_ops.linear_destroy, handle)
        self._finalizer.atexit = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product for each token.

        Args:
            x: [..., K] bfloat16 or float16.

        Returns:
            [..., N] in x's dtype.

        Raises:
            ValueError: for a wrong shape or dtype.
        """
        if x.dim() == 0:
            raise ValueError("x is a single number, wanted rows of the layer's input size")
        if x.layout != torch.strided:
            raise ValueError(f"x is {x.layout}, wanted a dense tensor")
        if x.shape[-1] != self.columns:
            raise ValueError(
                f"x has rows of {x.shape[-1]} elements, the layer's input size is {self.columns}"
            )
        y: torch.Tensor = raw_ops.linear(x.reshape(-1, x.shape[-1]), self.handle, self.rows)
        return y.view(*x.shape[:-1], self.rows)
