"""HybridMoEMethod: the method of layers whose experts lie in the host's memory."""

from dataclasses import replace
from typing import Any

import torch
from torch.nn import Module
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from lvllm import sharing
from lvllm.engine import ExpertLayer, explain
from lvllm.errors import layer_errors
from lvllm.formats import ExpertFormat
from lvllm.formats.base import Shape
from lvllm.log import logger
from lvllm.moe import engine_layer, offloading
from lvllm.moe.engine_method import EngineMoEMethod
from lvllm.settings.configuration import HybridConfig
from lvllm.units import ranges

__all__ = ["HybridMoEMethod"]


class HybridMoEMethod(EngineMoEMethod):
    """Keeps a layer's weights in the engine's memory and computes the layer with lk.

    Another engine may have loaded the experts, which this one then shares.
    """

    def __init__(self, moe: FusedMoEConfig, weight_format: ExpertFormat, prefix: str) -> None:
        target = HybridConfig.current().use_weight.of(prefix)
        super().__init__(moe, weight_format, target, prefix)
        self.follower = sharing.follower()
        self.offload = offloading.join(prefix)
        if self.offload is None:
            self.operator = torch.ops.lvllm.expert_block
            self.has_padding = moe.dp_size > 1
        logger.info_once(
            "LvLLM: experts on lk, %s, %d threads on %d NUMA node(s), CPUs %s",
            self.info.isa,
            self.info.threads,
            len(self.info.nodes),
            ranges(sorted({cpu for worker in self.info.cpus for cpu in worker})),
        )

    def _create(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        if self.follower is None:
            super()._create(layer, shape, dtype, attributes)
            return
        shape = replace(shape, allocate=sharing.allocate_on_meta)
        with sharing.without_memory():
            ignored = attributes | {"weight_loader": sharing.ignore_weight}
            self._register(layer, shape, dtype, ignored)

    def publisher(self) -> sharing.Publisher | None:
        return sharing.publisher()

    def keep(self, layer: Any, experts: ExpertLayer) -> None:
        layer.engine, layer.engine_handle = experts, experts.handle
        logger.info_once(
            "LvLLM: %s experts with %d-bit activations are multiplied as %s",
            experts.format,
            experts.activation_bits,
            explain(experts.format, experts.activation_bits, self.info.rates),
        )

    @layer_errors
    def process_weights_after_loading(self, layer: Any) -> None:
        """Complete the layer after vLLM has loaded all weights.

        Raises LayerError if the checkpoint lacks any of the weights. If another engine loads the
        shared experts and ends before they are complete, this raises LayerError too.
        """
        if self.follower is None:
            super().process_weights_after_loading(layer)
        else:
            experts = engine_layer.make_of_shared(layer, self.follower, self.activation_bits)
            self.keep(layer, experts)
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if parameter.is_meta:
                    delattr(layer, name)
        if self.offload is not None:
            offload, layer_number = self.offload
            layer.offloaded = offload.add(
                layer_number,
                layer.layer_name,
                layer.engine,
                topk=self.moe.experts_per_token,
                routed=self.moe.num_experts,
            )
