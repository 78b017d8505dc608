"""Experts' weights as the gguf package makes them from the blocks of a GGUF file.

`lvllm verify` compares them with what lies in the engine's memory, which is made by other code.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvllm.checkpoint.gguf.architecture import EXPERTS, FUSED
from lvllm.checkpoint.gguf.finding import gguf_of
from lvllm.checkpoint.gguf.folder import is_presented
from lvllm.checkpoint.gguf_headers import GgufHeader, GgufTensor, open_gguf
from lvllm.checkpoint.moe_layers import layer_number
from lvllm.formats.gguf import TYPES

__all__ = ["GgufValues"]


class GgufValues:
    """The matrices of a model's experts, as far as the engine keeps them in the file's formats."""

    def __init__(self, header: GgufHeader, modules: Mapping[str, Any]) -> None:
        self._header = header
        self._modules = modules

    @classmethod
    def of(cls, model: Path, modules: Mapping[str, Any]) -> "GgufValues | None":
        """Those of vLLM's layers by their names; None for a model that is in no GGUF file."""
        file = gguf_of(str(model)) if is_presented(model) else None
        return None if file is None else cls(open_gguf(file), modules)

    def __call__(self, layer: str, name: str, expert: int) -> torch.Tensor | None:
        """float32 [rows, columns] of "w13", gate and then up, or "w2" of this process's `expert`.

        None: the engine has the weights in another format, to which they were converted.
        """
        module = self._modules[layer]
        number = layer_number(layer)
        parts = [f"blk.{number}.{part}.weight" for part in (FUSED, *EXPERTS)]
        fused, gate, up, down = (self._header.tensors.get(part) for part in parts)
        stored = {"w2": down} if name == "w2" else {"w13": fused or gate, "w3": up}
        found = []
        for matrix, tensor in stored.items():
            if tensor is None:
                continue
            of_layer = module.engine.format_of(matrix)
            held = TYPES.get(tensor.type)
            if held is None or (held.format or of_layer) != of_layer:
                return None
            whole = _matrix(tensor, self._number(module, expert))
            own = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(of_layer)
            whole = whole if own is None else whole.to(own).float()
            if fused and name == "w13":
                found += [self._share(module, half, 0) for half in whole.chunk(2)]
            else:
                found.append(self._share(module, whole, 1 if name == "w2" else 0))
        return torch.cat(found)

    @staticmethod
    def _number(module: Any, expert: int) -> int:
        """The number in the file of an expert of this process."""
        if module.expert_map is None:
            return expert
        return int((module.expert_map == expert).nonzero()[0])

    @staticmethod
    def _share(module: Any, matrix: torch.Tensor, dim: int) -> torch.Tensor:
        """What this rank has of a matrix."""
        ranks = module.moe_config.moe_parallel_config.tp_size
        return matrix.chunk(ranks, dim)[module.moe_config.tp_rank]


def _matrix(tensor: GgufTensor, expert: int) -> torch.Tensor:
    """One expert's matrix of a stacked tensor: float32 [rows, columns]."""
    from gguf import GGMLQuantizationType, dequantize

    _, rows, experts = tensor.shape
    size = tensor.nbytes // experts
    with tensor.file.open("rb") as file:
        file.seek(tensor.start + expert * size)
        raw = np.frombuffer(file.read(size), np.uint8)
    kind = GGMLQuantizationType[tensor.type]
    return torch.from_numpy(dequantize(raw.reshape(rows, -1).copy(), kind)).float()
