"""EngineMoEMethod: vLLM asks it to make a layer's parameters, which its loader then fills."""

from abc import abstractmethod
from typing import Any

import torch
from torch.nn import Module
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.utils.torch_utils import set_default_torch_dtype

from lvllm import startup
from lvllm.engine import ExpertLayer
from lvllm.errors import layer_errors
from lvllm.formats import ExpertFormat
from lvllm.formats.base import Shape, add_biases, empty
from lvllm.moe import activations, engine_layer
from lvllm.moe.arrivals import EXPERTS, Arrivals
from lvllm.moe.converted import Conversion, choose
from lvllm.settings.configuration import HybridConfig
from lvllm.settings.use_weight import UseWeight
from lvllm.sharing import Publisher

__all__ = ["EngineMoEMethod"]


class EngineMoEMethod(FusedMoEMethodBase):
    """Loads a layer's weights into the engine's memory, and brings them into the engine's order.

    `weight_format` says how the checkpoint stores the weights, and `target` in what they are
    computed. The constructor raises ValueError for a layer that the engine cannot hold, such as one
    with an unknown activation.
    """

    # With True, vLLM would move the weights to the GPU before process_weights_after_loading, and
    # back afterwards.
    requires_device_loading = False

    arrivals: Arrivals | None = None
    """Counts the loaded tensors; None where the model does not load them one by one."""
    complete = False
    """Whether the layer has been handed over."""
    has_padding = True
    """Whether rows of a batch may be padding."""

    def __init__(
        self, moe: FusedMoEConfig, weight_format: ExpertFormat, target: UseWeight, prefix: str
    ) -> None:
        super().__init__(moe)
        # Computes the layer of a handle. The accelerator does, unless a subclass says otherwise.
        self.operator: Any = torch.ops.lvllm.routed_experts
        self._refuse_unsupported(moe, prefix)
        config, rank = HybridConfig.current(), startup.host_rank()
        self.activation_bits = config.activation_bits
        self.dummy = get_current_vllm_config().load_config.load_format == "dummy"
        conversion = Conversion(target, config.quantize_on, config.engine_cpus[rank], self.dummy)
        self.weight_format = choose(weight_format, conversion, prefix)
        self.info = startup.start_engine(rank)

    @staticmethod
    def _refuse_unsupported(moe: FusedMoEConfig, prefix: str) -> None:
        try:
            activations.arguments(moe)
        except ValueError as error:
            raise ValueError(f"{prefix}: {error}") from None
        if not 1 <= moe.experts_per_token <= moe.num_experts:
            raise ValueError(
                f"{prefix}: config.json says that a token takes {moe.experts_per_token} of"
                f" {moe.num_experts} experts"
            )

    @layer_errors
    def create_weights(  # type: ignore[override]
        self,
        layer: Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the layer's parameters, for vLLM's loader to fill."""
        parts = 2 if self.moe.is_act_and_mul else 1
        shape = Shape(num_experts, hidden_size, intermediate_size_per_partition, parts)
        self._create(layer, shape, params_dtype, extra_weight_attrs)

    def _create(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        if self.weight_format.arrives:
            self.arrivals = Arrivals(
                layer, attributes["weight_loader"], complete=lambda: self._hand_over(layer)
            )
            attributes = attributes | {"weight_loader": self.arrivals.load}
        with torch.device("cpu"):  # Where vLLM uses a GPU, that GPU is the default device here.
            self._register(layer, shape, dtype, attributes)
        if self.arrivals is not None:
            self.arrivals.expect(shape.parts)

    def _register(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        self.weight_format.create_weights(layer, shape, dtype, attributes)
        if self.moe.has_bias:
            add_biases(layer, shape, dtype, attributes)

    def _hand_over(self, layer: Any) -> None:
        """Hand the loaded weights to the engine, and free the parameters.

        The engine has copies of some tensors, such as scales in another dtype. The float32 scales
        of all layers would otherwise take an eighth of what 4-bit weights take.
        """
        # While vLLM builds and loads a model, the model's dtype is PyTorch's default dtype.
        with set_default_torch_dtype(torch.float32):
            tensors = self.weight_format.tensors(layer)
            experts = engine_layer.make(layer, tensors, self.activation_bits, self.publisher())
            del tensors
        parameters = layer.named_parameters(recurse=False)
        empty(parameter for name, parameter in parameters if name.startswith(EXPERTS))
        self.keep(layer, experts)
        self.complete = True

    def publisher(self) -> Publisher | None:
        """What gives the layer to other engines, if any does."""
        return None

    @abstractmethod
    def keep(self, layer: Any, experts: ExpertLayer) -> None:
        """Keep the loaded experts of vLLM's `layer`."""

    @layer_errors
    def process_weights_after_loading(self, layer: Any) -> None:
        """Complete the layer after vLLM has loaded all weights.

        Raises LayerError if the checkpoint lacks any of the weights. If another engine loads the
        shared experts and ends before they are complete, this raises LayerError too.
        """
        if self.arrivals is not None and not self.dummy:
            self.arrivals.require_all()
            self.arrivals.close()
        if not self.complete:  # Without a complete count, the handover is still due.
            self._hand_over(layer)

    def get_fused_moe_quant_config(self, layer: Module) -> FusedMoEQuantConfig:  # type: ignore[override]
        """No quantisation: lk takes 16-bit activations, whatever the weights' format is."""
        return FusedMoEQuantConfig.make()

    @property
    def topk_indices_dtype(self) -> torch.dtype:
        """lk takes 32-bit expert ids."""
        return torch.int32

    def apply(  # type: ignore[override]
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run the routed experts of `layer` on x [M, H]. The result is [M, H] in x's dtype.

        topk_ids [M, k] are the model's expert ids. An id of -1 stands for no expert, and nothing is
        computed for it. With expert parallelism the ids of other ranks' experts become -1 too.
        """
        bias = layer.e_score_correction_bias
        if bias is not None and len(bias) > self.moe.num_experts:
            # In the places of experts that return their input (LongCat-Flash), vLLM leaves expert 0
            # with the weight 0, for which nobody should read an expert.
            topk_ids = topk_ids.masked_fill(topk_weights == 0, -1)
        if self.has_padding:
            topk_ids = _without_padding(topk_ids)
        if layer.expert_map is not None:
            # vLLM's routers give padded rows the id -1, which as an index would be the last expert.
            topk_ids = layer.expert_map[topk_ids].where(topk_ids >= 0, -1)
        return self.operator(x, topk_ids, topk_weights, layer.engine_handle)


def _without_padding(topk_ids: torch.Tensor) -> torch.Tensor:
    """Give the rows that are padding the id -1, so that nobody reads an expert for them.

    Some of vLLM's routers do so, but not those with groups of experts or of a model's own. Only
    graphs and replicas have such rows. The mask is a tensor, which a graph reads at each replay.

    With VLLM_MOE_SKIP_PADDING=0 there is none: vLLM's runner then does not write it, and whatever a
    dummy run left in it, namely that all rows are padding, would hold for all tokens.
    """
    if not (envs.VLLM_MOE_SKIP_PADDING and is_forward_context_available()):
        return topk_ids
    padding = get_forward_context().is_padding
    if padding is None or len(padding) != len(topk_ids):
        return topk_ids
    return topk_ids.masked_fill(padding.unsqueeze(1), -1)
