"""Experts computed in another format than the checkpoint's, converted layer by layer while loading.

A layer's parameters lie in ordinary memory, which takes pages only as the loader writes. Once the
layer's last tensor is there, its experts are converted one by one into engine memory, and the
parameters' memory is freed. So the peak is the converted model and the layers being loaded.
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
from lvllm.formats.base import ExpertFormat, Shape, empty
from lvllm.formats.integers import INT4_GROUP
from lvllm.log import logger
from lvllm.machine import thread_pool
from lvllm.settings.variables import UseWeight
from lvllm.units import ceil_div

__all__ = ["Conversion", "Converted", "choose"]


MOST_BYTES = 1 << 30
"""Bytes that all threads together may take; each takes four times its matrix's size in float32."""


@dataclass(frozen=True)
class Conversion:
    """What is wanted of a model's experts.

    TO_DTYPE: the model's dtype; INT4: 4-bit groups of 32; KEEP: what the checkpoint has if the
    engine computes that, and else the model's dtype.
    """

    target: UseWeight
    device: str
    """Where the arithmetic is done."""
    cpus: tuple[int, ...]
    """Where its threads run, if that is the CPU."""
    dummy: bool
    """Whether weights are made up instead of loaded."""


def choose(source: ExpertFormat, wanted: Conversion, prefix: str) -> ExpertFormat:
    """What the experts of the layer called `prefix`, stored as `source`, are computed in."""
    fits = {
        UseWeight.KEEP: source.computable,
        UseWeight.TO_DTYPE: source.bits == 16,
        UseWeight.INT4: source.bits == 4 and source.computable,
    }
    return source if fits[wanted.target] else Converted(source, wanted, prefix)


class Converted(ExpertFormat):
    """Experts stored as `source`, computed as is wanted. KEEP: what the engine does not compute of
    a source may show only when it is loaded.
    """

    def __init__(self, source: ExpertFormat, wanted: Conversion, prefix: str) -> None:
        self.source = source
        self.wanted = wanted
        self.prefix = prefix
        self.bits = 4 if wanted.target == UseWeight.INT4 else 16
        self.arrives = source.arrives
        self.loaded: list[torch.nn.Parameter] = []
        self.room: dict[str, torch.Tensor] = {}

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        self.shape, self.dtype, self.attributes = shape, dtype, attributes
        if self.wanted.target != UseWeight.KEEP:
            self._make_room()  # now: what does not fit should be said before weights are read
        if not self.wanted.dummy:
            self._create(layer)

    def _create(self, layer: Module) -> None:
        ordinary = replace(self.shape, allocate=_ordinary)
        before = set(layer.parameters(recurse=False))
        self.source.create_weights(layer, ordinary, self.dtype, self.attributes)
        # What else the layer has, biases, stays as it is.
        self.loaded = [p for p in layer.parameters(recurse=False) if p not in before]

    def _convert(self, layer: Any) -> dict[str, Any]:
        """What is made of the layer, which keeps nothing of what it was loaded into."""
        # Detached: what is kept must not be emptied with the parameters.
        tensors = {
            name: value.detach() if isinstance(value, torch.Tensor) else value
            for name, value in self.source.tensors(layer).items()
        }
        if self.wanted.target == UseWeight.KEEP and computable(tensors):
            made = self._moved(tensors)
        else:
            if self.wanted.target == UseWeight.KEEP:
                logger.info_once(
                    "LvLLM: lk has no %d-bit format for experts in groups of this size or order;"
                    " they are computed in %s. LVLLM_MOE_USE_WEIGHT=INT4 takes less memory, and"
                    " rounds them once more.",
                    self.source.bits,
                    str(self.dtype).removeprefix("torch."),
                )
            made = self._made(tensors)
        del tensors
        empty(self.loaded)  # before the engine orders what is made of it
        return made

    def tensors(self, layer: Any) -> dict[str, Any]:
        if self.wanted.dummy:
            # vLLM would have filled the parameters of all layers at once.
            self._create(layer)
            for parameter in self.loaded:
                initialize_single_dummy_weight(parameter)
        return self._convert(layer)

    def _moved(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """The same weights in engine memory."""
        moved = dict(tensors)
        for name, parts, _, _ in self.shape.matrices:
            stored = tensors[name]
            moved[name] = self.shape.allocate(stored.shape, stored.dtype, parts=parts)
            moved[name].copy_(stored)
        return moved

    def _make_room(self) -> None:
        """Engine memory for what a conversion makes."""
        int4 = self.wanted.target == UseWeight.INT4
        dtype = torch.uint8 if int4 else self.dtype
        for name, parts, rows, columns in self.shape.matrices:
            size = (self.shape.experts, rows, columns // 2 if int4 else columns)
            self.room[name] = self.shape.allocate(size, dtype, parts=parts)

    def _made(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """The weights converted, and what else the source has."""
        of_weights = ("", "_scale", "_zero", "_order", "_global_scale")
        left = {f"{name}{suffix}" for name in ("w13", "w2") for suffix in of_weights}
        left |= {"format", "group_size"}
        made = {name: value for name, value in tensors.items() if name not in left}
        if not self.room:
            self._make_room()
        for name, room in self.room.items():
            if self.wanted.target == UseWeight.INT4:
                scale = self._int4(tensors, name, room)
                made |= {"format": "int4", "group_size": INT4_GROUP, f"{name}_scale": scale}
            else:
                made["format"] = {torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
                self._to_dtype(tensors, name, room)
        made |= self.room
        self.room = {}
        return made

    def _int4(self, tensors: dict[str, Any], name: str, codes: torch.Tensor) -> torch.Tensor:
        """Fill in the codes; returns the scales."""
        experts, rows, pairs = codes.shape
        groups = ceil_div(2 * pairs, INT4_GROUP)
        scales = torch.empty((experts, rows, groups), dtype=torch.bfloat16)

        def quantize_one(expert: int) -> None:
            weight = values(tensors, name, expert, self.wanted.device)
            # Zeros in the last group change neither its scale nor its other codes.
            whole = F.pad(weight, (0, groups * INT4_GROUP - 2 * pairs))
            try:
                code, scale = quantize.int4(whole, INT4_GROUP)
            except ValueError as error:  # NaN or infinity
                raise ValueError(f"{self.prefix}: {name} of expert {expert}: {error}") from None
            codes[expert].copy_(code[:, :pairs])
            scales[expert].copy_(scale)

        self._for_each_expert(quantize_one)
        return scales

    def _to_dtype(self, tensors: dict[str, Any], name: str, out: torch.Tensor) -> None:
        """Fill in the values."""

        def convert_one(expert: int) -> None:
            out[expert].copy_(values(tensors, name, expert, self.wanted.device))

        self._for_each_expert(convert_one)

    def _for_each_expert(self, do: Callable[[int], None]) -> None:
        """Calls it for each, on several threads if the arithmetic is the CPU's."""
        largest = max(rows * columns for _, _, rows, columns in self.shape.matrices)
        threads = min(len(self.wanted.cpus), MOST_BYTES // (16 * largest), self.shape.experts)
        if self.wanted.device != "cpu":
            threads = 1
        with thread_pool.pool(max(1, threads), self.wanted.cpus) as pool:
            for _ in pool.map(do, range(self.shape.experts)):
                pass  # or raises what was raised there


def _ordinary(size: Any, dtype: torch.dtype, *, parts: int) -> torch.Tensor:
    """As `bank.allocate`, without counting: memory that is promised and freed before it is all
    written.
    """
    return torch.empty(size, dtype=dtype)
