"""All layers of a process."""

from collections.abc import Iterator

import pytest
import torch

from lvllm import engine
from lvllm.engine import ExpertLayer
from lvllm.errors import LayerError
from lvllm.verifying.model import LayerReport, quickly, verify
from lvllm.verifying.stored import matrix
from tests.random_layers import Random, random_layer


@pytest.fixture(autouse=True)
def engine_as_it_was() -> Iterator[None]:
    yield
    engine.configure()


@pytest.fixture
def layers() -> dict[str, ExpertLayer]:
    formats = {"model.layers.0.experts": "bf16", "model.layers.1.experts": "int4"}
    return {
        name: random_layer(Random(5), format, 6, 128, 96).make() for name, format in formats.items()
    }


def test_everything(layers: dict[str, ExpertLayer]) -> None:
    reports = verify(layers)
    assert [report.name for report in reports] == list(layers)
    assert [report.wrong for report in reports] == [None, None]
    for report in reports:
        assert {one.isa for one in report.products} <= set(engine.available_isas())
        assert all(one.right for one in report.products)
        assert report.worst in report.products
        assert LayerReport.model_validate_json(report.model_dump_json()) == report


def test_weights_of_a_file(layers: dict[str, ExpertLayer]) -> None:
    """A code that is wrong by one is seen, and what the engine converted is not compared."""

    def of_file(name: str, which: str, expert: int) -> torch.Tensor | None:
        return None if layers[name].format == "bf16" else matrix(layers[name], which, expert)

    converted, same = verify(layers, of_file)
    assert (converted.from_file, same.from_file) == (None, 0)
    assert converted.wrong is None
    assert same.wrong is None

    def wrong(name: str, which: str, expert: int) -> torch.Tensor | None:
        values = of_file(name, which, expert)
        if values is not None and which == "w2":
            values[1, 2] += values.abs().max() / 8  # The codes of int4 go to 8.
        return values

    assert str(verify(layers, wrong)[1].wrong).startswith(
        "model.layers.1.experts: weights in int4 differ from those of the file by "
    )


def test_quickly(layers: dict[str, ExpertLayer]) -> None:
    said = quickly(layers)
    assert said.startswith("of 2 layers, 2 were compared with float32 (worst error ")
    assert "the weights of 2 were looked at" in said
    none = quickly(layers, seconds=-1)
    assert none.startswith("of 2 layers, 0 were compared with float32")


def test_a_damaged_expert(layers: dict[str, ExpertLayer]) -> None:
    layers["model.layers.0.experts"].tensors["w2"][4] *= 2**8
    said = "model.layers.0.experts: expert 4, w2: its weights are "
    assert str(verify(layers)[0].wrong).startswith(said)
    with pytest.raises(LayerError) as error:
        quickly(layers)
    assert str(error.value).startswith(said)


def test_several_damages_are_one_line(layers: dict[str, ExpertLayer]) -> None:
    weights = layers["model.layers.0.experts"].tensors["w13"]
    weights[1:4] = torch.nan
    report = verify({"x": layers["model.layers.0.experts"]})[0]
    assert report.wrong == ("x: expert 1, w13: 24576 weights are NaN; 2 more experts look damaged")


def test_a_wrong_product(layers: dict[str, ExpertLayer], monkeypatch: pytest.MonkeyPatch) -> None:
    from lvllm.verifying import layer as one
    from lvllm.verifying.reference import expert_block

    monkeypatch.setattr(one, "expert_block", lambda *a: 1.1 * expert_block(*a))
    wrong = verify(layers)[0].wrong
    assert wrong is not None
    assert wrong.startswith("model.layers.0.experts: bf16 experts on ")
    assert " from float32, and " in wrong
    with pytest.raises(LayerError, match="from float32, and"):
        quickly({"model.layers.0.experts": layers["model.layers.0.experts"]})
