"""Which of a layer's expert tensors have come from the checkpoint.

vLLM's loader hands each tensor to the `weight_loader` of a parameter, in any order, and says
nothing of those that never come. An `Arrivals` stands between the two.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from lvllm.errors import LvllmError

__all__ = ["EXPERTS", "Arrivals", "LayerError"]

EXPERTS = ("w13_", "w2_")
"""What the names of experts' parameters begin with."""
SHARDS = ("w1", "w3", "w2")
"""vLLM's names of the projections gate, up and down. Without a gate, w1 is up."""

Missing = tuple[str, int, str]
"""Parameter, expert of this process, projection."""


class LayerError(LvllmError):
    """What is wrong with a layer's tensors together, whichever of them came last."""


class Arrivals:
    """Counts the expert tensors of one layer as they are loaded.

    Wanted is what this process holds of every parameter called w13_NAME or w2_NAME, for each expert
    and projection, but of those with the attribute `optional`. A parameter with the attribute
    `place`, a function of an expert's data, a tensor and its projection, is not left to vLLM.

    Args:
        layer: the layer; its parameters may be registered later.
        load: its weight loader, with the arguments of vLLM's.
        complete: called once, in the thread that brought the last tensor.
    """

    def __init__(
        self, layer: Any, load: Callable[..., bool | None], complete: Callable[[], None]
    ) -> None:
        self._layer = layer
        self._load = load
        self._complete = complete
        self._missing: set[Missing] = set()
        self._names: dict[int, str] = {}
        self._lock = threading.Lock()

    def expect(self, parts: int) -> None:
        """Want all tensors of the parameters that the layer has now; w13 is of `parts`."""
        for name, parameter in self._layer.named_parameters(recurse=False):
            if not name.startswith(EXPERTS):  # the router's, in some models
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
        shard_id: str | None,
        expert_id: int | None,
        return_success: bool = False,
    ) -> bool | None:
        """Load one tensor as vLLM does, and note that it came.

        What comes again after its layer was converted, and its memory freed, is left.
        """
        local = self._local(expert_id)
        loaded = local != -1 and param.numel() > 0
        if loaded and hasattr(param, "place"):
            param.place(param.data[local], loaded_weight, shard_id)
        elif loaded:
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
            # Some models load all experts at once, and some of them all projections of a parameter.
            experts: Iterable[int] = range(self._layer.local_num_experts)
            if local is not None and loaded_weight.dim() < 3:
                experts = (local,)
            shards = [shard_id] if shard_id else SHARDS
            self._note({(name, expert, shard) for expert in experts for shard in shards})
        return loaded if return_success else None

    # vLLM asks a parameter's loader whether it takes experts.
    load.supports_moe_loading = True  # type: ignore[attr-defined]

    def _local(self, expert: int | None) -> int | None:
        """The expert's number in this process, -1 if it is another's."""
        if expert is None:
            return None
        number: int = self._layer._map_global_expert_id_to_local_expert_id(expert)
        return number

    def _note(self, came: set[Missing]) -> None:
        with self._lock:
            last = bool(self._missing) and self._missing <= came
            self._missing -= came
        if last:
            try:
                self._complete()
            except ValueError as error:
                name: str = self._layer.layer_name
                said = str(error)
                raise LayerError(said if said.startswith(name) else f"{name}: {said}") from None

    def require_all(self) -> None:
        """Raises ValueError, in one line with the checkpoint's name, if a tensor never came."""
        if self._missing:
            first, count = min(self._missing, key=self._order), len(self._missing)
            more = f", nor are {count - 1} others of its layer's experts" if count > 1 else ""
            raise ValueError(f"{self._name(first)} is not in the checkpoint{more}")

    @staticmethod
    def _order(missing: Missing) -> tuple[int, str, str]:
        name, expert, shard = missing
        return expert, shard, name

    def _name(self, missing: Missing) -> str:
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
