"""ExpertLayer: the routed experts of one layer, in every format that the engine computes.

In the shapes, E is the number of experts, H the hidden size, I the intermediate size, M the number
of tokens, and k the number of experts for each token. K is the dimension that a projection sums
over: H for w13, I for w2. g is the group size along K.
"""

from __future__ import annotations

import math
import weakref
from typing import Literal, get_args

import torch

from lvllm.engine import weight_formats
from lvllm.engine.ops import raw_ops

__all__ = ["Activation", "ExpertLayer"]

Activation = Literal["silu", "gelu", "gelu_tanh", "swigluoai", "swiglustep", "relu2"]
UNGATED = ("relu2",)
"""Activations without a gate; all others multiply a gate with an up projection."""


class ExpertLayer:
    """The routed experts of one layer.

    Args:
        format: how the weights are stored, one of `weight_formats.ALL_FORMATS`.
        w2_format: how those of w2 are stored, if differently. The scales of each projection are
            those of its format.
        w3_format: how those of w3 are stored; not nvfp4.
        w13: [E, 2I, H]: for each expert the gate rows, then the up rows; [E, I, H] if the
            activation has no gate, or if w3 has the up rows. uint8 [E, 2I, H/2] for the 4-bit
            formats, and [E, 2I, H/b * bytes of a block] for blocks of b weights of GGUF.
        w3: the up rows [E, I, H], if they are stored in another format than the gate rows.
        w2: [E, H, I], or uint8 [E, H, I/2] or [E, H, I/b * bytes of a block].
        w13_scale: for a projection [E, rows, columns] (columns counts weights)
            fp8: float32 [E, ceil(rows/128), ceil(columns/128)], [E, rows] or [E];
            int8: bfloat16, float16 or float32 [E, rows, ceil(columns/g)]; without groups float32
            [E, rows];
            int4: bfloat16, float16 or float32 [E, rows, ceil(columns/g)]; without groups [E, rows];
            mxfp4: uint8, the exponents of e8m0, [E, rows, ceil(columns/32)];
            nvfp4: float8_e4m3fn [E, rows, ceil(columns/16)].
        w3_scale: the same.
        w2_scale: the same.
        w13_zero: int4 only, uint8 of the scale's shape; it is subtracted instead of 8.
        w2_zero: the same.
        w13_global_scale: nvfp4 only, float32 factors of the scales: [E, 2] for gate and up ([E, 1]
            without a gate).
        w2_global_scale: the same, [E].
        w13_bias: bfloat16, float16 or float32, [E, 2I]. It is not allowed with w3.
        w2_bias: the same, [E, H].
        group_size: int4 and int8 only: 32, 64 or 128; None or -1: each row has one scale.
        activation: "silu", "gelu" (exact) and "gelu_tanh" compute f(gate) * up.
            "swigluoai" computes (up + beta) * gate * sigmoid(alpha * gate), where gate is first
            limited to at most `swiglu_limit`, and up to between minus and plus `swiglu_limit`
            (gpt-oss; DeepSeek-V4 has alpha 1 and beta 0). "swiglustep" computes silu(gate), limits
            it to at most `swiglu_limit`, and multiplies it with up, limited to between minus and
            plus that (Step-3.5). "relu2" computes relu(up)^2, without a gate.
        swiglu_alpha: a constant of swigluoai.
        swiglu_beta: the other one.
        swiglu_limit: the limit of swigluoai and swiglustep.
        interleaved: the rows of w13, its scales, zero points and bias are gate 0, up 0, gate 1, ...
        activation_bits: 16 or 8, for int8, int4, mxfp4, nvfp4 and blocks. With 8,
            activations are rounded to 8 bits, in blocks along K with a float32 scale each. A block
            of x has the largest size from 16 to 256 that divides g, and at most 64 (32 for mxfp4
            and nvfp4) on CPUs without VNNI. A block of the intermediate has 32, or 16 for nvfp4.
            Activations keep 16 bits on CPUs without AVX2, and on CPUs without VNNI for int8 and
            iq4. None: the variable LK_ACTIVATION_BITS decides; without it or with
            `auto`, int8 and q6_k take 16 and the others take 8 (docs/performance.md and
            docs/gguf.md have the measurements).
        w3_activation_bits: the same for the input of w3; only if there is w3.
        w2_activation_bits: the same for the input of w2; only if w2_format is another format.
        apply_router_weight_on_input: scale x by the router's weight instead of the expert's output.
        ordered: the tensors belong to another layer and are in the engine's order already, so they
            are only read.

    All tensors are contiguous and on the CPU. The layer owns them: it reorders weights, scales,
    zero points and float32 biases in place (`tiles`) and computes on that memory, without a second
    copy. `bank.allocate` gives memory that is fast to compute on.

    Sums are in float32. The relative Frobenius error against float32 on dequantised weights is
    below 3e-3, and most of it comes from rounding the result. It is below 3.5e-3 for float16 x
    where the CPU multiplies bfloat16, and below 1.5e-2 with 8-bit activations. A token's result
    depends neither on threads and NUMA nodes nor on the other tokens in the batch.

    Raises:
        ValueError: for an argument that is not allowed. The text names the argument, its value and
            what is wanted.
    """

    def __init__(
        self,
        *,
        format: str,
        w2_format: str | None = None,
        w3_format: str | None = None,
        w13: torch.Tensor,
        w3: torch.Tensor | None = None,
        w2: torch.Tensor,
        w13_scale: torch.Tensor | None = None,
        w3_scale: torch.Tensor | None = None,
        w2_scale: torch.Tensor | None = None,
        w13_zero: torch.Tensor | None = None,
        w2_zero: torch.Tensor | None = None,
        w13_global_scale: torch.Tensor | None = None,
        w2_global_scale: torch.Tensor | None = None,
        w13_bias: torch.Tensor | None = None,
        w2_bias: torch.Tensor | None = None,
        group_size: int | None = None,
        activation: str = "silu",
        swiglu_alpha: float = 1.702,
        swiglu_beta: float = 1.0,
        swiglu_limit: float = 7.0,
        interleaved: bool = False,
        activation_bits: int | None = None,
        w3_activation_bits: int | None = None,
        w2_activation_bits: int | None = None,
        apply_router_weight_on_input: bool = False,
        ordered: bool = False,
    ) -> None:
        w2_format = w2_format or format
        weight_formats.check_choice("format", format, tuple(weight_formats.ALL_FORMATS))
        weight_formats.check_choice("w2_format", w2_format, tuple(weight_formats.ALL_FORMATS))
        weight_formats.check_choice("activation", activation, get_args(Activation))
        stored = weight_formats.ALL_FORMATS[format]
        w2_stored = weight_formats.ALL_FORMATS[w2_format]
        gated = activation not in UNGATED
        if interleaved and not gated:
            raise ValueError(f"interleaved is True, but activation {activation} has no gate")
        if (w3 is None) != (w3_format is None):
            given, missing = ("w3_format", "w3") if w3 is None else ("w3", "w3_format")
            raise ValueError(f"{given} was given, but {missing} was not")
        if w3_format is not None:
            _check_own_up(w3_format, activation, interleaved, w13_bias)
        elif w3_scale is not None:
            raise ValueError("w3_scale was given, but w3 was not")
        parts = 2 if gated and w3 is None else 1
        if not swiglu_limit > 0:
            raise ValueError(f"swiglu_limit is {swiglu_limit}, must be greater than 0")
        for name, factor in (("swiglu_alpha", swiglu_alpha), ("swiglu_beta", swiglu_beta)):
            if not math.isfinite(factor):
                raise ValueError(f"{name} is {factor}, must be finite")
        bits = weight_formats.activation_bits(format, activation_bits)
        if w2_activation_bits is None and w2_format == format:
            w2_activation_bits = bits
        w2_bits = weight_formats.activation_bits(w2_format, w2_activation_bits)
        w3_bits = bits
        if w3_format is not None:
            w3_bits = weight_formats.activation_bits(w3_format, w3_activation_bits)

        weight_formats.check_weights("w13", w13, stored.weight)
        weight_formats.check_weights("w2", w2, w2_stored.weight)
        experts, rows, hidden = w13.shape[0], w13.shape[1], stored.columns(w13.shape[2])
        if stored.elements(hidden) != w13.shape[2]:
            raise ValueError(
                f"w13 has rows of {w13.shape[2]} bytes, wanted whole blocks of {stored.block_bytes}"
            )
        if rows % (parts * w2_stored.unit) != 0:
            raise ValueError(
                f"w13 has {rows} rows an expert, wanted a multiple of {parts * w2_stored.unit}:"
                f" {'gate and up' if parts == 2 else 'gate' if gated else 'no gate'},"
                f" {w2_stored.unit} weights"
                f" {'a block' if w2_stored.block_bytes else 'an element'}"
            )
        intermediate = rows // parts
        if tuple(w2.shape) != (experts, hidden, w2_stored.elements(intermediate)):
            raise ValueError(
                f"w2 has shape {tuple(w2.shape)}, w13 of {tuple(w13.shape)} wants "
                f"{(experts, hidden, w2_stored.elements(intermediate))}"
            )
        if w3 is not None and w3_format is not None:
            w3_stored = weight_formats.ALL_FORMATS[w3_format]
            wanted = (experts, intermediate, w3_stored.elements(hidden))
            weight_formats.check_tensor("w3", w3, (w3_stored.weight,), (wanted,))
            if w3_stored.columns(wanted[2]) != hidden:
                raise ValueError(f"w3 has {hidden} columns, wanted a multiple of {w3_stored.unit}")
        group = weight_formats.group_size_of(
            (format, w2_format, w3_format or format), group_size, max(hidden, intermediate)
        )
        shapes = {"w13": (experts, rows, hidden), "w2": (experts, hidden, intermediate)}
        w13_scale = weight_formats.check_scale("w13_scale", w13_scale, format, shapes["w13"], group)
        w2_scale = weight_formats.check_scale("w2_scale", w2_scale, w2_format, shapes["w2"], group)
        if w3_format is not None:
            w3_scale = weight_formats.check_scale(
                "w3_scale", w3_scale, w3_format, (experts, intermediate, hidden), group
            )
        w13_zero = weight_formats.check_zero("w13_zero", w13_zero, format, w13_scale)
        w2_zero = weight_formats.check_zero("w2_zero", w2_zero, w2_format, w2_scale)
        if format == w2_format and (w13_zero is None) != (w2_zero is None):
            given, missing = ("w2", "w13") if w13_zero is None else ("w13", "w2")
            raise ValueError(f"{given}_zero was given, but {missing}_zero was not")
        for name, scale, shape, of in (
            ("w13_global_scale", w13_global_scale, (experts, parts), format),
            ("w2_global_scale", w2_global_scale, (experts,), w2_format),
        ):
            weight_formats.check_presence(name, scale, of, wanted=of == "nvfp4")
            if scale is not None:
                weight_formats.check_tensor(name, scale, (torch.float32,), (shape,))
        for name, bias, shape in (
            ("w13_bias", w13_bias, (experts, rows)),
            ("w2_bias", w2_bias, (experts, hidden)),
        ):
            if bias is not None:
                weight_formats.check_tensor(name, bias, weight_formats.FLOATS, (shape,))

        self.format, self.w2_format = format, w2_format
        self.w3_format = w3_format
        """None: w13 has the up rows, too."""
        self.activation = activation
        self.activation_bits, self.w2_activation_bits = bits, w2_bits
        self.w3_activation_bits = w3_bits
        self.num_experts, self.hidden_size, self.intermediate_size = experts, hidden, intermediate
        self.parts = parts
        """The number of projections in w13: 2 (gate and up), or 1."""
        self.projections = 3 if gated else 2
        """The number of projections of an expert: gate, up and down, or up and down."""
        self.group_size = group
        """How many columns share a scale: at least a whole row for int4 without groups; 0 for
        formats that have no groups."""
        self.swiglu = (swiglu_alpha, swiglu_beta, swiglu_limit)
        self.apply_router_weight_on_input = apply_router_weight_on_input
        # The engine keeps only pointers, so these references keep the memory alive.
        self._tensors: dict[str, torch.Tensor | None] = {
            "w13": w13,
            "w3": w3,
            "w2": w2,
            "w13_scale": w13_scale,
            "w3_scale": w3_scale,
            "w2_scale": w2_scale,
            "w13_zero": w13_zero,
            "w2_zero": w2_zero,
            "w13_global_scale": w13_global_scale,
            "w2_global_scale": w2_global_scale,
            "w13_bias": None if w13_bias is None else w13_bias.float(),
            "w2_bias": None if w2_bias is None else w2_bias.float(),
        }
        handle: int = raw_ops.layer_create(
            format=format,
            w3_format=w3_format or format,
            w2_format=w2_format,
            activation=activation,
            activation_bits=bits,
            w3_activation_bits=w3_bits,
            w2_activation_bits=w2_bits,
            group_size=group,
            interleaved=interleaved,
            swiglu_alpha=swiglu_alpha,
            swiglu_beta=swiglu_beta,
            swiglu_limit=swiglu_limit,
            weight_on_input=apply_router_weight_on_input,
            ordered=ordered,
            names=list(self.tensors),
            tensors=list(self.tensors.values()),
        )
        self._ordered = ordered
        self.handle = torch.tensor(handle, dtype=torch.int64, device="cpu")
        """int64 scalar that identifies the layer for `torch.ops.lvllm.expert_block`."""
        # The engine must forget the layer before the tensors are freed.
        self._finalizer = weakref.finalize(self, raw_ops.layer_destroy, handle)
        self._finalizer.atexit = False

    def __call__(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """For each token, the sum over j of topk_weights[:, j] * expert(topk_ids[:, j])(x).

        Args:
            x: [M, H] bfloat16 or float16; each row contiguous.
            topk_ids: [M, k] int32 or int64; an id of -1 stands for no expert.
            topk_weights: [M, k] float32.

        Returns:
            [M, H] in x's dtype.

        Raises:
            ValueError: for a wrong shape or dtype, an id that is no expert, or a released layer.
        """
        out: torch.Tensor = raw_ops.expert_block(x, topk_ids, topk_weights, self.handle)
        return out

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that the layer computes on, in the engine's order, by argument name."""
        return {name: tensor for name, tensor in self._tensors.items() if tensor is not None}

    def format_of(self, name: str) -> str:
        """The format of "w13", "w3" or "w2"."""
        own = {"w2": self.w2_format, "w3": self.w3_format}.get(name)
        return own or self.format

    def drop(self) -> None:
        """End the layer and let its tensors go, in the engine's order.

        Sizes, formats and activation remain, for copies of the tensors elsewhere.
        """
        self._finalizer()
        self._tensors = {}

    def release(self) -> None:
        """Put all tensors back into their original order, and end the layer.

        An `ordered` layer leaves the tensors as they are.

        Raises:
            ValueError: if the layer was released before.
        """
        if self._ordered:
            raw_ops.layer_destroy(self.handle.item())
        else:
            raw_ops.layer_restore(self.handle.item())
        self._finalizer.detach()
        self._tensors = {}


def _check_own_up(
    w3_format: str, activation: str, interleaved: bool, w13_bias: torch.Tensor | None
) -> None:
    """Check what a layer may have whose up rows are in w3."""
    # The up rows of nvfp4 would need a global scale of their own, which no checkpoint has.
    allowed = tuple(name for name in weight_formats.ALL_FORMATS if name != "nvfp4")
    weight_formats.check_choice("w3_format", w3_format, allowed)
    if activation in UNGATED:
        raise ValueError(f"w3 was given, but activation {activation} has no gate")
    if interleaved:
        raise ValueError("w3 was given, but interleaved is True")
    if w13_bias is not None:
        raise ValueError("w3 was given, and so was w13_bias")
