"""Convert experts to another format than the checkpoint's, layer by layer while loading.

A layer's parameters lie in ordinary memory, which takes pages only as the loader writes. Once the
layer's last tensor is loaded, its experts are converted one by one into the engine's memory, and
the parameters' memory is freed. The peak is therefore the converted model and the layers that are
being loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn import Module
from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

from lvllm.engine import quantize
from lvllm.engine.dequantize import computable, values
from lvllm.engine.weight_formats import DTYPES
from lvllm.formats.base import ExpertFormat, Shape, empty
from lvllm.formats.integers import INT4_GROUP
from lvllm.log import logger
from lvllm.machine import thread_pool
from lvllm.settings.use_weight import UseWeight
from lvllm.units import ceil_div

__all__ = ["Conversion", "Converted", "choose"]


MAX_SCRATCH_BYTES = 1 << 30
"""Bytes that all threads together may take for intermediate results. Each thread takes four times
the size of its matrix in float32."""


@dataclass(frozen=True)
class Conversion:
    """How a model's experts are to be converted."""

    target: UseWeight
    """TO_DTYPE is the model's dtype. INT4 is 4-bit integers in groups of 32. INT8 and FP8 have a
    scale for each row. KEEP is the checkpoint's format if the engine computes it, and otherwise the
    model's dtype."""
    device: str
    """The device that does the arithmetic: "cpu" or "cuda"."""
    cpus: tuple[int, ...]
    """The logical CPUs for the threads of the conversion, if the device is the CPU."""
    dummy: bool
    """Whether weights are made up instead of loaded (vLLM's load format `dummy`)."""


BITS = {UseWeight.INT4: 4, UseWeight.INT8: 8, UseWeight.FP8: 8}
"""Bits of a weight in the formats to which experts are quantised."""
BY_ROWS = {UseWeight.INT8: quantize.int8, UseWeight.FP8: quantize.fp8_channels}
"""The functions that quantise with a scale for each row; the engine calls the formats alike."""


def choose(source: ExpertFormat, conversion: Conversion, prefix: str) -> ExpertFormat:
    """The format in which a layer's experts are computed: `source`, or a conversion of it.

    `source` is the checkpoint's format, and `prefix` the layer's name. Experts that have no more
    bits than the target are not quantised once more.
    """
    if conversion.target == UseWeight.TO_DTYPE:
        fits = source.bits == 16
    else:
        fits = source.computable and source.bits <= BITS.get(conversion.target, source.bits)
    if fits:
        return source
    return Converted(source, conversion, prefix)


class Converted(ExpertFormat):
    """Experts that the checkpoint stores as `source` and that are converted after loading.

    With KEEP, only the loaded tensors show whether the engine computes them as they are: act-order,
    for example, may have left the groups in order.
    """

    def __init__(self, source: ExpertFormat, conversion: Conversion, prefix: str) -> None:
        self.source = source
        self.conversion = conversion
        self.prefix = prefix
        self.bits = BITS.get(conversion.target, 16)
        self.arrives = source.arrives
        self.loaded: list[torch.nn.Parameter] = []
        self.results: dict[str, torch.Tensor] = {}

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        self.shape, self.dtype, self.attributes = shape, dtype, attributes
        if self.conversion.target != UseWeight.KEEP:
            # If the memory does not suffice, the error should come before any weight is read.
            self._allocate_results()
        if not self.conversion.dummy:
            self._create(layer)

    def _create(self, layer: Module) -> None:
        ordinary = replace(self.shape, allocate=_ordinary)
        before = set(layer.parameters(recurse=False))
        self.source.create_weights(layer, ordinary, self.dtype, self.attributes)
        # Only the source's parameters are freed later. Others, such as biases, stay.
        self.loaded = [p for p in layer.parameters(recurse=False) if p not in before]

    def _convert(self, layer: Any) -> dict[str, Any]:
        """The converted weights of a loaded layer, whose parameters are freed."""
        # The tensors are detached, so that freeing the parameters leaves tensors that are kept.
        tensors = {
            name: value.detach() if isinstance(value, torch.Tensor) else value
            for name, value in self.source.tensors(layer).items()
        }
        if self.conversion.target == UseWeight.KEEP and computable(tensors):
            converted = self._copied(tensors)
        else:
            if self.conversion.target == UseWeight.KEEP:
                logger.info_once(
                    "LvLLM: lk has no %d-bit format for experts in groups of this size or order;"
                    " they are computed in %s. LVLLM_MOE_USE_WEIGHT=INT4 takes less memory, and"
                    " rounds them once more.",
                    self.source.bits,
                    str(self.dtype).removeprefix("torch."),
                )
            converted = self._converted(tensors)
        del tensors
        empty(self.loaded)  # now, because the engine needs memory when it reorders the result
        return converted

    def tensors(self, layer: Any) -> dict[str, Any]:
        if self.conversion.dummy:
            # The parameters are created only now, because vLLM would have filled those of all
            # layers at once.
            self._create(layer)
            for parameter in self.loaded:
                initialize_single_dummy_weight(parameter)
        return self._convert(layer)

    def _copied(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """The same tensors, with the weights copied into the engine's memory."""
        copied = dict(tensors)
        for name, parts, _, _ in self.shape.matrices:
            stored = tensors[name]
            copied[name] = self.shape.allocate(stored.shape, stored.dtype, parts=parts)
            copied[name].copy_(stored)
        return copied

    def _allocate_results(self) -> None:
        """Allocate the engine's memory for the converted w13 and w2."""
        target = self.conversion.target
        int4 = target == UseWeight.INT4
        dtype = DTYPES[target.lower()] if target in BITS else self.dtype
        for name, parts, rows, columns in self.shape.matrices:
            size = (self.shape.experts, rows, columns // 2 if int4 else columns)
            self.results[name] = self.shape.allocate(size, dtype, parts=parts)

    def _converted(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """The converted weights, and the source's other tensors, such as biases, as they are."""
        suffixes = ("", "_scale", "_zero", "_order", "_global_scale")
        replaced = {f"{name}{suffix}" for name in ("w13", "w3", "w2") for suffix in suffixes}
        replaced |= {"format", "w3_format", "w2_format", "group_size"}
        converted = {name: value for name, value in tensors.items() if name not in replaced}
        if not self.results:
            self._allocate_results()
        for name, result in self.results.items():
            if self.conversion.target == UseWeight.INT4:
                scale = self._fill_int4(tensors, name, result)
                converted |= {"format": "int4", "group_size": INT4_GROUP, f"{name}_scale": scale}
            elif self.conversion.target in BY_ROWS:
                scale = self._fill_rows(tensors, name, result)
                converted |= {"format": self.conversion.target.lower(), f"{name}_scale": scale}
            else:
                converted["format"] = {torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
                self._fill_values(tensors, name, result)
        converted |= self.results
        self.results = {}
        return converted

    def _fill_int4(self, tensors: dict[str, Any], name: str, codes: torch.Tensor) -> torch.Tensor:
        """Quantise all experts into `codes` [E, rows, columns / 2], and return their scales."""
        experts, rows, pairs = codes.shape
        groups = ceil_div(2 * pairs, INT4_GROUP)
        scales = torch.empty((experts, rows, groups), dtype=torch.bfloat16)

        def quantize_one(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            # Zeros in the last group change neither its scale nor its other codes.
            padded = F.pad(weight, (0, groups * INT4_GROUP - 2 * pairs))
            code, scale = quantize.int4(padded, INT4_GROUP)
            return code[:, :pairs], scale

        self._fill_codes(tensors, name, quantize_one, codes, scales)
        return scales

    def _fill_rows(self, tensors: dict[str, Any], name: str, codes: torch.Tensor) -> torch.Tensor:
        """Quantise all experts into `codes` [E, rows, columns], and return their scales."""
        scales = torch.empty(codes.shape[:2], dtype=torch.float32)
        self._fill_codes(tensors, name, BY_ROWS[self.conversion.target], codes, scales)
        return scales

    def _fill_codes(
        self,
        tensors: dict[str, Any],
        name: str,
        quantize_one: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        codes: torch.Tensor,
        scales: torch.Tensor,
    ) -> None:
        """Put what `quantize_one` returns for each expert into `codes` and `scales`."""

        def fill_one(expert: int) -> None:
            try:
                code, scale = quantize_one(values(tensors, name, expert, self.conversion.device))
            except ValueError as error:  # NaN or infinity
                raise ValueError(f"{self.prefix}: {name} of expert {expert}: {error}") from None
            codes[expert].copy_(code)
            scales[expert].copy_(scale)

        self._for_each_expert(fill_one)

    def _fill_values(self, tensors: dict[str, Any], name: str, out: torch.Tensor) -> None:
        """Dequantise all experts into `out` [E, rows, columns], which has the model's dtype."""

        def convert_one(expert: int) -> None:
            out[expert].copy_(values(tensors, name, expert, self.conversion.device))

        self._for_each_expert(convert_one)

    def _for_each_expert(self, convert: Callable[[int], None]) -> None:
        """Call convert(expert) for each expert, on several threads if the CPU computes."""
        largest = max(rows * columns for _, _, rows, columns in self.shape.matrices)
        cpus = self.conversion.cpus
        threads = min(len(cpus), MAX_SCRATCH_BYTES // (16 * largest), self.shape.experts)
        if self.conversion.device != "cpu":
            threads = 1
        with thread_pool.pool(max(1, threads), cpus) as pool:
            for _ in pool.map(convert, range(self.shape.experts)):
                pass  # Taking the result raises an error that the thread met.


def _ordinary(size: Any, dtype: torch.dtype, *, parts: int) -> torch.Tensor:
    """A tensor in ordinary memory, with the arguments of `bank.allocate`.

    It does not count towards the engine's memory: it is freed before pages of all layers' tensors
    have been written.
    """
    return torch.empty(size, dtype=dtype)
