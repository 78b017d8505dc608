"""ResidentMoEMethod: the method of resident layers that vLLM has no kernels for."""

from typing import Any

from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from lvllm.engine import ExpertLayer
from lvllm.errors import LayerError
from lvllm.formats import ExpertFormat
from lvllm.gpu import ResidentLayer, open_accelerator
from lvllm.moe.engine_method import EngineMoEMethod
from lvllm.settings.configuration import HybridConfig
from lvllm.settings.use_weight import UseWeight

__all__ = ["ResidentMoEMethod"]


class ResidentMoEMethod(EngineMoEMethod):
    """Keeps a layer's experts on the accelerator as lk has them, and computes them there.

    The host's memory holds a layer only until it is complete.
    """

    def __init__(
        self, moe: FusedMoEConfig, weight_format: ExpertFormat, prefix: str, remedy: str
    ) -> None:
        """`remedy` says what the user can do if the accelerator cannot compute the layer."""
        super().__init__(moe, weight_format, UseWeight.KEEP, prefix)
        self.remedy = remedy

    def keep(self, layer: Any, experts: ExpertLayer) -> None:
        layer.engine_handle = experts.handle
        accelerator = open_accelerator(HybridConfig.current().accelerator)
        try:
            layer.on_device = ResidentLayer(accelerator, experts)
        except ValueError as error:
            raise LayerError(f"{layer.layer_name}: {error}; {self.remedy}") from error
