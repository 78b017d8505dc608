"""Weights outside the experts that a checkpoint does not have."""

import pytest
import torch
from torch.nn import Module
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from lvllm.checkpoint.headers import CheckpointError
from lvllm.loading.completeness import load_all_rows, require_names


class Linear(Module):
    """Has what a linear layer of vLLM has, as far as the checks look."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(rows, 3))
        self.quant_method = UnquantizedLinearMethod()


class Model(Module):
    """A linear layer and two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = Linear(4)
        self.norm = torch.nn.LayerNorm(3)
        self.last = torch.nn.LayerNorm(3, bias=False)


@pytest.mark.parametrize(
    ("lacks", "line"),
    [
        ((), None),
        (("norm.bias",), "norm.bias is not in the checkpoint"),
        (
            ("norm.weight", "norm.bias", "last.weight"),
            "last.weight is not in the checkpoint, nor are 2 others",
        ),
        (("proj.weight",), None),  # the rows of linear layers are checked instead
    ],
)
def test_names_that_were_not_loaded(lacks: tuple[str, ...], line: str | None) -> None:
    model = Model()
    loaded = {name for name, _ in model.named_parameters()} - set(lacks)
    if line is None:
        require_names(model, loaded)
        return
    with pytest.raises(CheckpointError) as caught:
        require_names(model, loaded)
    assert str(caught.value) == line


def test_a_model_that_reports_no_names_is_not_checked() -> None:
    require_names(Model(), None)


def test_rows_that_were_not_loaded() -> None:
    model = Model()

    def load(rows: slice) -> None:
        model.proj.weight.data[rows] = 1

    load_all_rows(lambda: load(slice(None)), model)
    with pytest.raises(CheckpointError) as caught:
        load_all_rows(lambda: load(slice(2)), model)
    assert str(caught.value) == (
        "proj.weight is not in the checkpoint, or NaN: 2 of its 4 rows, the first is 2"
    )


def test_a_weight_whose_memory_is_replaced_while_loading() -> None:
    model = Model()

    def load() -> None:
        model.proj.weight.data = torch.ones(4, 3)

    load_all_rows(load, model)


def test_a_head_that_vllm_adds_need_not_be_in_the_checkpoint() -> None:
    model = Model()
    model.score = Linear(2)
    before = model.score.weight.detach().clone()

    def load() -> None:
        model.proj.weight.data.zero_()

    with pytest.raises(CheckpointError, match=r"^score\.weight is not in the checkpoint"):
        load_all_rows(load, model)
    model.score.weight.data.copy_(before)
    load_all_rows(load, model, "score")
    assert torch.equal(model.score.weight, before)


def test_a_routers_bias_that_was_not_loaded() -> None:
    model = Model()
    model.gate = Linear(2)
    model.gate.e_score_correction_bias = torch.nn.Parameter(torch.zeros(2))

    def load(names: tuple[str, ...]) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith(names):
                parameter.data.zero_()

    with pytest.raises(CheckpointError) as caught:
        load_all_rows(lambda: load(("weight",)), model)
    assert str(caught.value) == (
        "gate.e_score_correction_bias is not in the checkpoint, or NaN: 2 of its 2 rows, the first"
        " is 0"
    )
    load_all_rows(lambda: load(("weight", "bias")), model)
