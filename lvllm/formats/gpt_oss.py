"""Experts of gpt-oss: unquantised ones, OpenAI's own packing of mxfp4, and GGUF files.

vLLM's model loads each tensor as a whole, and does not report which tensors it has seen.
"""

import re
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch.nn import Module

from lvllm.checkpoint.headers import TensorInfo
from lvllm.engine.weight_formats import FORMATS
from lvllm.errors import TensorError
from lvllm.formats import gguf
from lvllm.formats.base import ExpertFormat, Shape, wrong_shape
from lvllm.formats.descriptor import Descriptor, Stored
from lvllm.formats.fp4 import Mxfp4
from lvllm.formats.unquantized import Unquantized

__all__ = ["DESCRIPTOR", "GptOssGguf", "GptOssMxfp4", "GptOssPlain", "check_shapes", "find"]

EXPERTS = re.compile(
    r"\.mlp\.experts\.(?P<one>\d+\.)?(?P<name>gate_up_proj|down_proj)(?P<what>_\w+)?$"
)
"""The names of all experts' tensors; some checkpoints have a tensor for each expert."""

DESCRIPTOR = Descriptor(
    "gpt-oss mxfp4",
    stored=lambda section, module: Stored(bits=4),
    quantizations=("gpt_oss_mxfp4",),
    quant_methods=("mxfp4", "gpt_oss_mxfp4"),
    exceptions=("modules_to_not_convert",),
    weights=("_blocks",),
    scales=("_scales",),
)


def find(quant_config: Any, layer: Any, prefix: str) -> ExpertFormat | None:
    """Experts of gpt-oss, whose model loads its tensors in a way of its own."""
    from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts

    if not isinstance(layer, GptOssRoutedExperts):
        return None
    if quant_config is None:
        return GptOssPlain()
    if DESCRIPTOR.describes(quant_config):
        return GptOssMxfp4()
    if gguf.DESCRIPTOR.describes(quant_config):
        return GptOssGguf(*gguf.held(quant_config, prefix))
    raise ValueError(
        f"{prefix}: gpt-oss quantised as {quant_config.get_name()!r} is not supported; supported"
        " are its own mxfp4, bfloat16, float16 and GGUF files"
    )


def check_shapes(config: Any, tensors: Iterable[TensorInfo]) -> None:
    """Raise CheckpointError if experts of gpt-oss have another shape than `config` says.

    The model takes the part of each tensor that it has memory for, and leaves the rest. Where a
    packed tensor is too small, it fills a part of the memory. `config` is that of config.json.
    """
    hidden, up = config.hidden_size, 2 * config.intermediate_size
    group = FORMATS["mxfp4"].group_size
    assert group is not None
    for info in tensors:
        found = EXPERTS.search(info.name)
        if found is None:
            continue
        gate_up = found["name"] == "gate_up_proj"
        outputs, inputs = (up, hidden) if gate_up else (hidden, up // 2)
        one = {
            None: (inputs, outputs),
            "_bias": (outputs,),
            "_blocks": (outputs, inputs // group, group // 2),
            "_scales": (outputs, inputs // group),
        }.get(found["what"])
        if one is None:
            continue
        wanted = one if found["one"] else (config.num_local_experts, *one)
        if info.shape != wanted:
            raise info.refuse(wrong_shape(info.shape, wanted))


class GptOssPlain(Unquantized):
    """gate_up_proj [E, H, 2I] and down_proj [E, I, H], which the model transposes and copies into
    w13_weight and w2_weight without calling a parameter's loader. So that missing tensors are
    noticed, one weight of each expert begins as NaN.
    """

    arrives = False
    STORED: ClassVar = {"w13_weight": "gate_up_proj", "w2_weight": "down_proj"}

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        super().create_weights(layer, shape, dtype, attributes)
        for name in self.STORED:
            getattr(layer, name).data[:, 0, 0] = torch.nan

    def tensors(self, layer: Any) -> dict[str, Any]:
        for name, stored in self.STORED.items():
            if getattr(layer, name).data[:, 0, 0].isnan().any():
                raise ValueError(f"{layer.layer_name}.{stored} is not in the checkpoint, or NaN")
        return super().tensors(layer)


class GptOssMxfp4(Mxfp4):
    """gate_up_proj_blocks [E, 2I, H / 32, 16] and down_proj_blocks: the bytes of the engine's
    codes; and _scales. Codes have no NaN to begin with, so a loader notes which tensors came.
    """

    arrives = False
    STORED: ClassVar = {"w13_weight": "gate_up_proj_blocks", "w2_weight": "down_proj_blocks"}

    def __init__(self) -> None:
        super().__init__("weight")
        self.came: set[str] = set()

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        load = attributes["weight_loader"]

        def note(param: Any, loaded_weight: torch.Tensor, weight_name: str, **more: Any) -> Any:
            self.came.add(weight_name.rpartition(".")[2])
            return load(param, loaded_weight, weight_name=weight_name, **more)

        super().create_weights(layer, shape, dtype, attributes | {"weight_loader": note})

    def tensors(self, layer: Any) -> dict[str, Any]:
        for name, stored in self.STORED.items():
            # With dummy weights no tensor comes, not even scales.
            if f"{name}_scale" in self.came and name not in self.came:
                raise ValueError(f"{layer.layer_name}.{stored} is not in the checkpoint")
        return super().tensors(layer)


class GptOssGguf(gguf.Gguf):
    """w13_weight, a row of gate and of up in turn, and w2_weight of single experts."""

    arrives = False
    together = True

    def __init__(self, gate: gguf.Held, up: gguf.Held, down: gguf.Held) -> None:
        super().__init__(gate, up, down)
        self.missing: set[tuple[str, int]] = set()

    def create_weights(
        self, layer: Any, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        self.missing = {(name, one) for name, *_ in shape.matrices for one in range(shape.experts)}

        def load(
            param: Any, loaded_weight: torch.Tensor, weight_name: str, expert_id: int, **_: Any
        ) -> bool:
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local == -1 or param.is_meta:  # Another process loads this expert.
                return False
            name = weight_name.rpartition(".")[2].removesuffix("_weight")
            try:
                param.place(param.data, local, loaded_weight, name)
            except ValueError as error:
                raise TensorError(str(error)) from error
            self.missing.discard((name, local))
            return True

        super().create_weights(layer, shape, dtype, attributes | {"weight_loader": load})

    def tensors(self, layer: Any) -> dict[str, Any]:
        if self.missing:
            name, expert = min(self.missing, key=lambda one: one[::-1])
            raise ValueError(
                f"{layer.layer_name}: {name} of expert {expert} (of those in this process) is not"
                f" in the file, nor are {len(self.missing) - 1} others"
            )
        return super().tensors(layer)
