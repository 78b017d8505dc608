"""Which of a layer's expert tensors have arrived from the checkpoint.

vLLM's loader hands each tensor to the `weight_loader` of a parameter, in any order, and does not
report tensors that never come. An `Arrivals` stands between the loader and the parameters.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch

from lvllm.errors import LayerError, LvllmError, TensorError, naming_layer
from lvllm.formats.base import stored_shape, wrong_shape

__all__ = ["EXPERTS", "NOT_AGAIN", "Arrivals"]

NOT_AGAIN = (
    "weights cannot be loaded again with LVLLM_MOE_NUMA_ENABLED=1, because lk keeps them in an"
    " order of its own: start anew with the new checkpoint"
)

EXPERTS = ("w13_", "w2_")
"""The names of experts' parameters begin with one of these."""
SHARDS = ("w1", "w3", "w2")
"""vLLM's names for the gate, up and down projections. Without a gate, w1 is the up projection."""

Missing = tuple[str, int, str]
"""The name of a parameter, the number of an expert in this process, and a projection."""


class Arrivals:
    """Counts the expert tensors of one layer as they are loaded.

    A tensor is wanted for every parameter called w13_NAME or w2_NAME, for each projection of it and
    each expert of this process, except for parameters with the attribute `optional`. vLLM's weight
    loader copies the tensors, except for parameters with the attribute `place`: that function takes
    the parameter's data, the number of an expert in it, the tensor and its projection, and copies
    it itself.

    Args:
        layer: the layer; its parameters may be registered later.
        load: vLLM's weight loader of the layer.
        complete: is called once, in the thread that brought the last tensor.
    """

    def __init__(
        self, layer: Any, load: Callable[..., bool | None], complete: Callable[[], None]
    ) -> None:
        self._layer = layer
        self._load = load
        self._complete = complete
        self._missing: set[Missing] = set()
        self._names: dict[int, str] = {}
        self._parts = 2
        self._lock = threading.Lock()
        self._closed = False

    def expect(self, parts: int) -> None:
        """Want all tensors of the parameters that the layer has now.

        `parts` is the number of projections in w13: 2 for gate and up, 1 without a gate.
        """
        self._parts = parts
        for name, parameter in self._layer.named_parameters(recurse=False):
            if not name.startswith(EXPERTS):  # some models keep the router's parameters here
                continue
            self._names[id(parameter)] = name
            if getattr(parameter, "optional", False):
                continue
            shards = SHARDS[2:] if name.startswith("w2_") else SHARDS[:parts]
            experts = range(self._layer.local_num_experts)
            self._missing |= {(name, expert, shard) for expert in experts for shard in shards}

    def load(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Load one tensor as vLLM does, and note that it arrived.

        Its shape must be the parameter's, over all ranks of tensor parallelism: vLLM would take
        the first rows of a tensor that is too long, and leave the rest.

        A tensor that comes once more after its layer was converted, when the parameter's memory is
        already freed, is ignored while the model is being loaded.

        Raises:
            TensorError: if the layer cannot take the tensor, because of its shape or otherwise.
            LayerError: if this was the last tensor and the layer cannot be completed, or if the
                model has been loaded before.
        """
        if self._closed:
            raise LayerError(f"{self._layer.layer_name}: {NOT_AGAIN}")
        experts = self._layer.global_num_experts
        if expert_id >= experts:
            raise TensorError(f"does not fit the model: it has more than {experts} experts")
        local = self._local(expert_id)
        loaded = local != -1 and param.numel() > 0
        if loaded and hasattr(param, "place"):
            self._place(param, local, loaded_weight, shard_id)
        elif loaded:
            self._check_shape(param, loaded_weight.shape, shard_id)
            loaded = bool(
                self._load(
                    param=param,
                    loaded_weight=loaded_weight,
                    weight_name=weight_name,
                    shard_id=shard_id,
                    expert_id=expert_id,
                    return_success=True,
                )
            )
        if loaded:
            name = self._names[id(param)]
            # Some models load all experts in one tensor.
            whole = loaded_weight.dim() == 3
            came = range(self._layer.local_num_experts) if whole else (local,)
            self._note({(name, expert, shard_id) for expert in came})
        return loaded if return_success else None

    # vLLM reads this attribute to learn whether a parameter's loader takes experts.
    load.supports_moe_loading = True  # type: ignore[attr-defined]

    def _check_shape(self, param: Any, shape: torch.Size, shard: str) -> None:
        ranks = self._layer.moe_config.moe_parallel_config.tp_size
        wanted = stored_shape(param, shard, self._parts, ranks)
        if len(shape) == 3:
            wanted = (self._layer.local_num_experts, *wanted)
        # A number that all of a projection shares is stored as [] or as [1].
        if tuple(shape) != wanted and not (wanted == () and shape.numel() == 1):
            raise TensorError(wrong_shape(shape, wanted))

    @staticmethod
    def _place(param: Any, local: int, tensor: torch.Tensor, shard: str) -> None:
        try:
            param.place(param.data, local, tensor, shard)
        except LvllmError:
            raise
        except ValueError as error:
            raise TensorError(str(error)) from error

    def _local(self, expert: int) -> int:
        """The expert's number in this process, or -1 if another process has it."""
        number: int = self._layer._map_global_expert_id_to_local_expert_id(expert)
        return number

    def _note(self, came: set[Missing]) -> None:
        with self._lock:
            last = bool(self._missing) and self._missing <= came
            self._missing -= came
        if last:
            with naming_layer(self._layer.layer_name):
                self._complete()

    def close(self) -> None:
        """Refuse all tensors from now on: the model has been loaded."""
        self._closed = True

    def require_all(self) -> None:
        """Raise LayerError, with a tensor's name in the checkpoint, if tensors never came."""
        if self._missing:
            first, count = min(self._missing, key=self._order), len(self._missing)
            more = f", nor are {count - 1} others of its layer's experts" if count > 1 else ""
            raise LayerError(f"{self._name(first)} is not in the checkpoint{more}")

    @staticmethod
    def _order(missing: Missing) -> tuple[int, str, str]:
        name, expert, shard = missing
        return expert, shard, name

    def _name(self, missing: Missing) -> str:
        """The tensor's name in the checkpoint."""
        name, expert, shard = missing
        layer = self._layer
        projection = {
            "w1": layer.ckpt_gate_proj_name,
            "w2": layer.ckpt_down_proj_name,
            "w3": layer.ckpt_up_proj_name,
        }[shard]
        everywhere = range(layer.global_num_experts)
        number = next(number for number in everywhere if self._local(number) == expert)
        return f"{layer.layer_name}.{number}.{projection}.{name.partition('_')[2]}"
