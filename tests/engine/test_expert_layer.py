"""`ExpertLayer` as a PyTorch operator: its inputs, its end, its processes and its memory."""

import os
import subprocess
import sys

import pytest
import torch

from lvllm.engine import ExpertLayer, bank
from tests.engine.random_case import Case, arguments_of
from tests.random_layers import FORMATS

pytestmark = pytest.mark.usefixtures("default_settings")


def test_strided_rows_and_int64_ids() -> None:
    case = Case(9, 100, 64, 4, 2)
    want = case.run()
    wide = torch.zeros(9, 130, dtype=torch.bfloat16)
    wide[:, 5:105] = case.x
    assert torch.equal(case.layer(wide[:, 5:105], case.ids.long(), case.weights), want)


@pytest.mark.parametrize("format", FORMATS)
def test_empty_batch_and_skipped_slots(format: str) -> None:
    case = Case(5, 64, 32, 2, 2, format=format, bias=True, skip=1.0)
    assert torch.equal(case.run(), torch.zeros(5, 64, dtype=torch.bfloat16))
    got = case.layer(case.x[:0], case.ids[:0], case.weights[:0])
    assert got.shape == (0, 64)
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize("format", FORMATS)
def test_release(format: str) -> None:
    arguments = arguments_of(format)
    tensors = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    layer = ExpertLayer(**(arguments | tensors))
    x, ids, weights = torch.ones(1, 64).bfloat16(), torch.zeros(1, 1).int(), torch.ones(1, 1)
    layer(x, ids, weights)
    layer.release()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.view(torch.uint8), arguments[name].view(torch.uint8)), name
    with pytest.raises(ValueError, match="names no expert layer"):
        layer(x, ids, weights)
    with pytest.raises(ValueError, match="names no expert layer"):
        layer.release()


def test_a_destroyed_layer_is_refused() -> None:
    layer = ExpertLayer(**arguments_of("bf16"))
    handle = layer.handle
    del layer
    x, ids, scale = torch.zeros(1, 64).bfloat16(), torch.zeros(1, 1).int(), torch.ones(1, 1)
    with pytest.raises(ValueError, match="names no expert layer"):
        torch.ops.lvllm.expert_block(x, ids, scale, handle)


def test_operator_is_sound() -> None:
    case = Case(3, 64, 32, 4, 2)
    torch.library.opcheck(
        torch.ops.lvllm.expert_block, (case.x, case.ids, case.weights, case.layer.handle)
    )


def test_compiles_without_graph_breaks() -> None:
    """Two layers share one compiled graph: the handle is an input of it, not a constant."""
    first, second = Case(3, 64, 32, 4, 2, seed=1), Case(3, 64, 32, 4, 2, seed=2)
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def model(x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.ops.lvllm.expert_block(x * 2, ids, w, h) + 1

    for case in (first, second):
        want = case.layer(case.x * 2, case.ids, case.weights) + 1
        assert torch.equal(model(case.x, case.ids, case.weights, case.layer.handle), want)
    assert graphs == 1


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter; hanging fails the test."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


PROGRAM = """
import os, torch
from lvllm import engine
torch.manual_seed(0)
w13, w2 = torch.randn(4, 64, 64).bfloat16(), torch.randn(4, 64, 32).bfloat16()
layer = engine.ExpertLayer(format="bf16", w13=w13, w2=w2)
x = torch.randn(2, 64).bfloat16()
call = lambda: layer(x, torch.zeros(2, 1).int(), torch.ones(2, 1))
first = call()
"""


def test_a_forked_child_computes_and_both_exit() -> None:
    got = run_python(
        PROGRAM
        + """
child = os.fork()
same = torch.equal(call(), first) and torch.equal(call(), first)
if child == 0:
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0 and same
print("both")
"""
    )
    assert (got.returncode, got.stdout) == (0, "both\n"), got.stderr


def test_exit_right_after_a_call() -> None:
    assert run_python(PROGRAM).returncode == 0


@pytest.mark.slow
def test_isa_from_the_environment() -> None:
    got = run_python("from lvllm import engine; print(engine.info().isa)", LK_ISA="portable")
    assert got.stdout == "portable\n"
    got = run_python(
        "from lvllm import engine\ntry: engine.info()\nexcept ValueError as e: print(e)",
        LK_ISA="sse9",
    )
    assert got.stdout.startswith('LK_ISA is "sse9", must be one of those this CPU runs: portable')


@pytest.mark.parametrize("format", FORMATS)
def test_layers_on_bank_memory(format: str) -> None:
    """They compute on that memory: no byte more is allocated from the bank."""
    case = Case(5, 100, 60, 3, 2, format=format)
    arguments = dict(case.weights_of.arguments)
    for name, parts in (("w13", 2), ("w2", 1)):
        weight = arguments[name]
        arguments[name] = bank.allocate(weight.shape, weight.dtype, parts=parts)
        arguments[name].view(torch.uint8).copy_(weight.view(torch.uint8))
    before = bank.allocated_bytes()
    layer = ExpertLayer(**arguments)
    assert bank.allocated_bytes() == before
    assert torch.equal(layer(case.x, case.ids, case.weights), case.run())
