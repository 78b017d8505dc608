"""Integer linear layers that vLLM's CPU kernels do not take: 8 bits, other groups, act-order.

Attention and shared experts are a small part of the weights of a Mixture-of-Experts model. They are
dequantised to the model's dtype once, and then multiplied like any other weights.
"""

import os
from typing import Any

import torch
from vllm.model_executor.kernels.linear import MPLinearKernel, register_linear_kernel
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    unpack_quantized_values_into_int32,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)
from vllm.platforms.interface import PlatformEnum
from vllm.scalar_type import scalar_types

from lvllm.engine import dequantize
from lvllm.formats import packing

__all__ = ["DequantizedIntegerLinear", "GptqLinear", "register"]

DISABLED = "VLLM_DISABLED_KERNELS"
NEEDS_AVX512 = "CPUWNA16LinearKernel"
"""vLLM's kernel for 4 bits. Its library for CPUs without AVX-512 lacks the operator of this kernel,
but the kernel takes every layer all the same.
"""
TYPES = (scalar_types.uint4, scalar_types.uint4b8, scalar_types.uint8, scalar_types.uint8b128)


class DequantizedIntegerLinear(MPLinearKernel):
    """A layer of compressed-tensors, whose weights and zero points are packed into int32."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Return -1, which stands for any CPU."""
        return -1

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        """Return whether the weights have 4 or 8 bits; any shape and group size will do."""
        return c.weight_type in TYPES, f"weights are {c.weight_type}"

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the integers by their values in the model's dtype."""
        kind = self.config.weight_type

        def rows_first(name: str, *, packed: bool) -> torch.Tensor:
            parameter = getattr(layer, name)
            data = parameter.data
            if packed:
                data = unpack_quantized_values_into_int32(data, kind, parameter.packed_dim)
            return data if parameter.output_dim == 0 else data.t()

        codes = rows_first(self.w_q_name, packed=True).float()
        scale = rows_first(self.w_s_name, packed=False).float()
        if self.config.zero_points:
            assert self.w_zp_name is not None
            zero = rows_first(self.w_zp_name, packed=True).float()
        else:
            zero = torch.full_like(scale, kind.bias)
        size = codes.shape[1] // scale.shape[1]
        weight = (codes - zero.repeat_interleave(size, 1)) * scale.repeat_interleave(size, 1)
        for name in filter(None, (self.w_q_name, self.w_s_name, self.w_zp_name)):
            if hasattr(layer, name):
                delattr(layer, name)
        layer.weight = torch.nn.Parameter(weight.to(self.config.act_type), requires_grad=False)
        UnquantizedLinearMethod().process_weights_after_loading(layer)

    def apply_weights(
        self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the product of x [..., K] and the weights, [..., N]."""
        y: torch.Tensor = layer.cpu_linear(x, layer.weight, bias)
        return y


class Order(BasevLLMParameter):
    """g_idx, int32 [K], or [projections, K] in a layer that several projections are merged in."""

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        """Copy the columns of this rank."""
        columns = len(self.data)
        self.data.copy_(loaded_weight.narrow(0, self.tp_rank * columns, columns))

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        """Copy g_idx of one of the merged projections."""
        self.data[self._shard_id_as_int(kwargs["shard_id"])].copy_(loaded_weight)

    load_qkv_weight = load_merged_column_weight


@register_weight_loader_v2_supported_method
class GptqLinear(LinearMethodBase):
    """A layer that loads GPTQ's qweight, qzeros, scales and g_idx, and then dequantises them.

    Args:
        bits: 4 or 8.
        group_size: the columns that share a scale; -1 stands for a whole row.
        symmetric: whether all zero points are in the middle of the range, so that qzeros is unused.
        ordered: whether g_idx says which group each column belongs to (act-order).
        v2: whether zero points are stored as in GPTQ's second format (`packing.gptq_zero`).
    """

    def __init__(
        self, bits: int, group_size: int, *, symmetric: bool, ordered: bool, v2: bool
    ) -> None:
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric
        self.ordered = ordered
        self.v2 = v2
        self.plain = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the layer's parameters, which vLLM's loader fills."""
        load = {"weight_loader": extra_weight_attrs["weight_loader"]}
        columns, rows = input_size_per_partition, sum(output_partition_sizes)
        per_word = 32 // self.bits
        packed = {"packed_factor": per_word, "input_dim": 0, "output_dim": 1}
        words = torch.empty(columns // per_word, rows, dtype=torch.int32)
        qweight = PackedvLLMParameter(data=words, packed_dim=0, **packed, **load)
        layer.register_parameter("qweight", qweight)
        # With act-order a column may need any scale. Without it, this rank's columns need only the
        # scales of their own groups.
        size = input_size if self.group_size == -1 else self.group_size
        whole = self.ordered or self.group_size == -1
        groups = (input_size if whole else columns) // size
        scales = torch.full((groups, rows), torch.nan, dtype=torch.float32)
        zeros = torch.zeros(groups, rows // per_word, dtype=torch.int32)
        if whole:
            scale = ChannelQuantScaleParameter(data=scales, output_dim=1, **load)
            qzeros = PackedColumnParameter(
                data=zeros, output_dim=1, packed_dim=1, packed_factor=per_word, **load
            )
        else:
            scale = GroupQuantScaleParameter(data=scales, input_dim=0, output_dim=1, **load)
            qzeros = PackedvLLMParameter(data=zeros, packed_dim=1, **packed, **load)
        layer.register_parameter("scales", scale)
        layer.register_parameter("qzeros", qzeros)
        self.partitions = output_partition_sizes
        several = output_partition_sizes[1:]
        size_of_order = (len(output_partition_sizes), columns) if several else (columns,)
        order = torch.zeros(size_of_order, dtype=torch.int32)
        layer.register_parameter("g_idx", Order(data=order, **load))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace the parameters by the weights' values in the model's dtype."""
        qweight, qzeros = layer.qweight.data, layer.qzeros.data
        if self.bits == 4:
            codes, middle = dequantize.nibbles(packing.gptq_int4(qweight)).float(), 8
            zero = packing.gptq_zero(qzeros, self.v2)
        else:
            codes, middle = packing.gptq_int8(qweight).float(), 0
            zero = packing.gptq_zero8(qzeros, self.v2)
        scale = packing.group_scale(layer.scales.data)
        centre = torch.full_like(scale, middle) if self.symmetric else zero.float()
        columns = codes.shape[1]
        weight = []
        for part, projection in enumerate(codes.split(self.partitions)):
            group = (
                layer.g_idx.data.view(-1, columns)[part]
                if self.ordered
                else torch.arange(columns) // (columns // scale.shape[1])
            )
            start = sum(self.partitions[:part])
            of_part = slice(start, start + len(projection))
            weight.append((projection - centre[of_part][:, group]) * scale[of_part][:, group])
        for name in ("qweight", "scales", "qzeros", "g_idx"):
            delattr(layer, name)
        data = torch.cat(weight).to(layer.params_dtype)
        layer.weight = torch.nn.Parameter(data, requires_grad=False)
        self.plain.process_weights_after_loading(layer)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the product of x [..., K] and the weights, [..., N]."""
        return self.plain.apply(layer, x, bias)


def register() -> None:
    """Offer the kernel after vLLM's own, which are taken wherever they run."""
    from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS

    if DequantizedIntegerLinear not in _POSSIBLE_KERNELS[PlatformEnum.CPU]:
        register_linear_kernel(DequantizedIntegerLinear, PlatformEnum.CPU, "mp")
    disabled = os.environ.get(DISABLED, "")
    if not hasattr(torch.ops._C, "cpu_gemm_wna16") and NEEDS_AVX512 not in disabled.split(","):
        os.environ[DISABLED] = f"{disabled},{NEEDS_AVX512}".removeprefix(",")
