"""lvllm.moe.arrivals: which tensors came, which did not, and when a layer is complete."""

import random
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Module, Parameter

from lvllm.errors import LayerError, TensorError
from lvllm.moe.arrivals import Arrivals

EXPERTS = 6
FIRST = 3
"""The test's process holds the experts from this number on."""
ROWS, COLUMNS = 2, 4
PARAMETERS = ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale")


class Layer(Module):
    """A layer with the second half of 6 experts, as one of two ranks of expert parallelism."""

    layer_name = "model.layers.3.mlp.experts"
    ckpt_gate_proj_name, ckpt_up_proj_name, ckpt_down_proj_name = (
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    global_num_experts, local_num_experts = EXPERTS, EXPERTS - FIRST
    moe_config = SimpleNamespace(moe_parallel_config=SimpleNamespace(tp_size=1))

    def __init__(self, parts: int) -> None:
        super().__init__()
        for name in PARAMETERS:
            self.add(name, parts * ROWS if name.startswith("w13") else ROWS, COLUMNS)
        self.add("w13_input_scale", optional=True)

    def add(self, name: str, *size: int, **attributes: Any) -> None:
        parameter = Parameter(torch.zeros(self.local_num_experts, *size), requires_grad=False)
        for key, value in attributes.items():
            setattr(parameter, key, value)
        self.register_parameter(name, parameter)

    def _map_global_expert_id_to_local_expert_id(self, expert: int) -> int:
        return max(expert - FIRST, -1)


class Loading:
    """A layer with its arrivals, and a stand-in for vLLM's weight loader."""

    def __init__(self, parts: int = 2) -> None:
        self.layer = Layer(parts)
        self.completed = 0
        self.arrivals = Arrivals(self.layer, self.load, self.complete)
        self.arrivals.expect(parts)

    def load(self, param: Parameter, loaded_weight: torch.Tensor, **named: Any) -> bool:
        local = self.layer._map_global_expert_id_to_local_expert_id(named["expert_id"])
        if local < 0:
            return False
        param.data[local][: len(loaded_weight)] += loaded_weight
        return True

    def complete(self) -> None:
        self.completed += 1

    def bring(self, name: str, expert: int, shard: str, *size: int) -> bool | None:
        brought = torch.ones(size or (ROWS, COLUMNS))
        return self.arrivals.load(
            getattr(self.layer, name), brought, f"experts.{name}", shard, expert, True
        )


def everything(parts: int = 2) -> list[tuple[str, int, str]]:
    shards = {"w13": ("w1", "w3")[:parts], "w2": ("w2",)}
    brought = [
        (name, expert, shard)
        for name in PARAMETERS
        for expert in range(EXPERTS)
        for shard in shards[name.partition("_")[0]]
    ]
    random.shuffle(brought)
    return brought


@pytest.mark.parametrize("parts", [1, 2])
def test_complete_with_the_last_tensor_of_this_rank(parts: int) -> None:
    loading = Loading(parts)
    brought = everything(parts)
    last = max(i for i, (_, expert, _) in enumerate(brought) if expert >= FIRST)
    for i, one in enumerate(brought):
        assert loading.bring(*one) == (one[1] >= FIRST)
        assert loading.completed == (i >= last)
    loading.arrivals.require_all()
    assert loading.bring(*brought[last])  # a second time
    assert loading.completed == 1


def test_nothing_comes_after_the_start() -> None:
    loading = Loading()
    brought = everything()
    for one in brought:
        loading.bring(*one)
    loading.arrivals.close()
    with pytest.raises(
        LayerError, match=r"^model\.layers\.3\.mlp\.experts: weights cannot be loaded"
    ):
        loading.bring(*brought[0])


def test_a_missing_tensor_is_named_as_in_the_checkpoint() -> None:
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    wanted = [one for one in everything() if one[1] >= FIRST]
    name, expert, shard = wanted[0]
    loading = Loading()
    for one in wanted[1:]:
        loading.bring(*one)
    assert not loading.completed
    missing = f"model.layers.3.mlp.experts.{expert}.{names[shard]}.{name.partition('_')[2]}"
    with pytest.raises(ValueError) as error:
        loading.arrivals.require_all()
    assert str(error.value) == f"{missing} is not in the checkpoint"

    with pytest.raises(ValueError, match=r"experts\.3\.gate_proj\.weight is not .* nor are 17 oth"):
        Loading().arrivals.require_all()


def test_a_tensor_of_all_experts() -> None:
    loading = Loading()
    loading.load = lambda **named: True  # type: ignore[assignment,method-assign]
    arrivals = Arrivals(loading.layer, loading.load, loading.complete)
    arrivals.expect(2)
    for name in PARAMETERS:
        for shard in ("w2",) if name.startswith("w2") else ("w1", "w3"):
            arrivals.load(getattr(loading.layer, name), torch.ones(3, 2, 4), name, shard, FIRST)
    arrivals.require_all()
    assert loading.completed == 1


def test_a_parameter_that_places_its_tensors() -> None:
    loading = Loading()

    def place(data: torch.Tensor, expert: int, loaded: torch.Tensor, shard: str) -> None:
        data[expert].copy_(loaded * 7)

    loading.layer.add("w2_g_idx", 4, place=place)
    loading.arrivals.expect(2)
    assert loading.bring("w2_g_idx", FIRST + 1, "w2", 4)
    assert not loading.bring("w2_g_idx", 0, "w2", 4)
    assert loading.layer.get_parameter("w2_g_idx").tolist() == [[0] * 4, [7] * 4, [0] * 4]


def test_a_tensor_that_does_not_fit_its_parameter() -> None:
    def place(data: torch.Tensor, expert: int, loaded: torch.Tensor, shard: str) -> None:
        raise ValueError("has 4 columns, wanted 8")

    loading = Loading()
    loading.layer.add("w2_g_idx", 4, place=place)
    loading.arrivals.expect(2)
    with pytest.raises(TensorError, match=r"^has 4 columns, wanted 8$"):
        loading.bring("w2_g_idx", FIRST, "w2")


@pytest.mark.parametrize("size", [(3, 4), (2, 5), (1, 4), (8,), (4, 2, 4), (1,)])
def test_a_tensor_of_another_shape_does_not_count(size: tuple[int, ...]) -> None:
    loading = Loading()
    for one in everything():
        if one == ("w13_weight", FIRST, "w1"):
            with pytest.raises(TensorError, match=r"^does not fit the model: has \["):
                loading.bring(*one, *size)
        else:
            loading.bring(*one)
    assert not loading.completed
    with pytest.raises(LayerError, match=r"experts\.3\.gate_proj\.weight is not in the ch"):
        loading.arrivals.require_all()


def test_more_experts_than_the_model_has() -> None:
    with pytest.raises(TensorError, match=r"^does not fit the model: it has more than 6 experts$"):
        Loading().bring("w2_weight", EXPERTS, "w2")


def test_a_tensor_that_comes_after_the_memory_was_freed_is_ignored() -> None:
    loading = Loading()
    loading.layer.w2_weight.data = torch.empty(0)
    assert not loading.bring("w2_weight", FIRST, "w2")


def test_an_error_about_a_whole_layer_names_it() -> None:
    loading = Loading()

    def complete() -> None:
        raise ValueError("w13: columns are in groups 0 to 9")

    arrivals = Arrivals(loading.layer, loading.load, complete)
    arrivals.expect(2)
    loading.arrivals = arrivals
    *others, last = [one for one in everything() if one[1] >= FIRST]
    for one in others:
        loading.bring(*one)
    with pytest.raises(LayerError, match=r"^model\.layers\.3\.mlp\.experts: w13: columns are in"):
        loading.bring(*last)


def test_threads_complete_a_layer_once() -> None:
    loading = Loading()
    brought = everything()
    threads = [
        threading.Thread(target=lambda part=brought[n::4]: [loading.bring(*one) for one in part])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loading.completed == 1
