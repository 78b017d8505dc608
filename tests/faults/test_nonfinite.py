"""The log of faulty rows: what the engine notes, and what becomes of it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lvllm import engine
from lvllm.faults import nonfinite
from lvllm.faults.nonfinite import EXPERT, INPUT, ROUTER, SUM, Layer, Watch

EXPERTS, HIDDEN = 4, 96
NAN = float("nan")


@pytest.fixture(autouse=True)
def no_watch() -> Iterator[None]:
    yield
    engine.watch(None)


def layer(dtype: torch.dtype = torch.bfloat16, poison: int | None = None) -> engine.ExpertLayer:
    """Random experts, of which one may hold a NaN."""
    w13 = torch.randn(EXPERTS, 2 * 72, HIDDEN).mul(HIDDEN**-0.5).to(dtype)
    w2 = torch.randn(EXPERTS, HIDDEN, 72).mul(72**-0.5).to(dtype)
    if poison is not None:
        w2[poison, 50, 70] = NAN
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return engine.ExpertLayer(format=name, w13=w13, w2=w2)


def a_watch(layers: list[engine.ExpertLayer], rows: int = 16) -> Watch:
    names = {
        int(one.handle): Layer(f"layers.{n}.experts", "bfloat16", None)
        for n, one in enumerate(layers)
    }
    return Watch([names], 0, torch.zeros(1, 2, rows + 2, 3, dtype=torch.int64))


def test_each_row_keeps_the_first_layer_that_it_went_wrong_in() -> None:
    layers = [layer(), layer(poison=2), layer()]
    seen = a_watch(layers)
    x = torch.randn(9, HIDDEN).to(torch.bfloat16)
    ids = torch.tensor([[0, 1]] * 9)
    ids[3, 1] = ids[7, 0] = ids[8, 0] = 2  # in the second layer a NaN
    weights = torch.full((9, 2), 0.5)
    spans = (("a", 2), ("b", 1), ("c", 2), ("d", 2), ("e", 1))  # row 8 is padding
    seen.start()
    x[5, 17] = float("inf")
    for one in layers:
        x = x + one(x, ids, weights)
    assert seen.stop()
    assert seen.faults(spans) == {
        "c": "layers.1.experts: expert 2 makes NaN or infinity of finite numbers",
        "d": "layers.0.experts: NaN or infinity came in with the input: the fault lies before the"
        " experts",
        "e": "layers.1.experts: expert 2 makes NaN or infinity of finite numbers",
    }
    # Nothing of it is left for the next steps, however often the log has been used.
    for _ in range(3):
        seen.start()
        layers[0](torch.ones(2, HIDDEN, dtype=torch.bfloat16), ids[:2], weights[:2])
        assert not seen.stop()


def test_what_is_computed_outside_a_step_is_not_noted() -> None:
    bad = layer(poison=0)
    seen = a_watch([bad])
    x, ids = torch.ones(1, HIDDEN, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int64)
    seen.start()
    assert not seen.stop()
    assert bad(x, ids, torch.ones(1, 1)).isnan().any()
    seen.start()
    assert not seen.stop()


@pytest.mark.parametrize(
    ("dtype", "weight", "says"),
    [
        (torch.bfloat16, NAN, "the router's weight for expert 1 is NaN or infinite"),
        (torch.float16, 1e6, "the sum of the experts is too large for bfloat16"),
    ],
)
def test_router_and_sum(dtype: torch.dtype, weight: float, says: str) -> None:
    one = layer(dtype)
    seen = a_watch([one])
    seen.start()
    one(torch.ones(1, HIDDEN, dtype=dtype), torch.tensor([[1]]), torch.tensor([[weight]]))
    assert seen.stop()
    assert seen.faults([("a", 1)]) == {"a": f"layers.0.experts: {says}"}


def test_rows_beyond_the_log_are_counted_together() -> None:
    bad = layer(poison=0)
    seen = a_watch([bad], rows=2)
    seen.start()
    bad(torch.ones(5, HIDDEN).bfloat16(), torch.zeros(5, 1, dtype=torch.int32), torch.ones(5, 1))
    assert seen.stop()
    assert "layers.0.experts: expert 0" in seen.any_fault()


def test_a_skipped_expert_does_no_harm() -> None:
    bad = layer(poison=3)
    seen = a_watch([bad])
    seen.start()
    bad(torch.ones(2, HIDDEN).bfloat16(), torch.tensor([[0, -1], [1, 2]]), torch.ones(2, 2))
    assert not seen.stop()


def test_a_fault_that_arose_is_named_rather_than_its_consequence_elsewhere() -> None:
    """Of two ranks the first sees only what the second's partial sums did to the next layer."""
    logs = torch.zeros(2, 2, 6, 3, dtype=torch.int64)
    first = {1: Layer("layers.0.experts", "bfloat16", (0, 2))}
    second = {1: Layer("layers.0.experts", "bfloat16", (1, 3)), 2: Layer("layers.1", "", None)}
    seen = Watch([first, second], 0, logs)
    seen.start()
    step = seen._step
    logs[0, step, 3] = torch.tensor([2, INPUT, -1])
    logs[1, step, 3] = torch.tensor([1, EXPERT, 1])
    logs[0, step, 0, 0] = logs[1, step, 0, 0] = 1
    assert seen.stop()
    assert seen.faults([("a", 2), ("b", 2)]) == {
        "b": "layers.0.experts: expert 3 makes NaN or infinity of finite numbers"
    }


def test_a_stage_does_not_see_what_later_ones_met_in_older_steps() -> None:
    """Of two stages the first is done with a step before the second begins it."""
    logs = torch.zeros(2, 3, 6, 3, dtype=torch.int64)
    layers = [{1: Layer("layers.0.experts", "", None)}, {1: Layer("layers.1.experts", "", None)}]
    first, second = Watch(layers, 0, logs, seen=1), Watch(layers, 1, logs, seen=2)
    for step in range(6):
        first.start()
        if step == 4:
            logs[0, first._step, 2] = torch.tensor([1, EXPERT, 3])
            logs[0, first._step, 0, 0] = 1
        assert first.stop() == (step == 4)
        second.start()
        if step == 0:
            logs[1, second._step, 1] = torch.tensor([1, EXPERT, 2])
            logs[1, second._step, 0, 0] = 1
        assert second.stop() == (step in (0, 4))
        told = second.faults([("a", 1), ("b", 1)])
        assert list(told) == {0: ["a"], 4: ["b"]}.get(step, [])


@pytest.mark.parametrize("source", [INPUT, ROUTER, EXPERT, SUM])
def test_every_message_is_one_line_that_names_the_layer(source: int) -> None:
    text = Layer("model.layers.7.mlp.experts", "float16", None).describe(source, 3)
    assert text.startswith("model.layers.7.mlp.experts: ")
    assert "\n" not in text


def test_processes_share_a_log(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.touch()
    os.truncate(file, 2 * 3 * 8)
    mine = nonfinite.shared_zeros((2, 3), str(file))
    if (child := os.fork()) == 0:
        nonfinite.shared_zeros((2, 3), str(file))[1, 2] = 7
        os._exit(0)
    os.waitpid(child, 0)
    assert mine.tolist() == [[0, 0, 0], [0, 0, 7]]


@pytest.mark.parametrize("log", [torch.zeros(5, 3), torch.zeros(5, 2, dtype=torch.int64)])
def test_a_log_of_another_kind_is_refused(log: torch.Tensor) -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"log must be .* \[rows \+ 2, 3\]"):
        engine.watch(log)
