"""lvllm.engine against float32 PyTorch, on random data and awkward shapes."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvllm import bank, engine
from lvllm.engine import ExpertLayer

ISAS = ("portable", "avx2", "avx512_bf16")
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
SIZES = (1, 2, 7, 31, 32, 33, 64, 100, 130, 257)


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    yield
    engine.configure()


def use_isa(isa: str, **options: object) -> None:
    try:
        engine.configure(isa=isa, **options)  # type: ignore[arg-type]
    except ValueError as error:
        pytest.skip(str(error))


class Case:
    """A layer of random weights with a random batch."""

    def __init__(
        self,
        tokens: int,
        hidden: int,
        intermediate: int,
        experts: int,
        topk: int,
        *,
        format: str = "bf16",
        activation: str = "silu",
        on_input: bool = False,
        skip: float = 0.0,
        seed: int = 0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        dtype = engine.DTYPES[format]

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random)

        self.w13 = (normal(experts, 2 * intermediate, hidden) * hidden**-0.5).to(dtype)
        self.w2 = (normal(experts, hidden, intermediate) * intermediate**-0.5).to(dtype)
        self.x = normal(tokens, hidden).to(dtype)
        self.ids = torch.randint(experts, (tokens, topk), generator=random, dtype=torch.int32)
        self.ids[torch.rand(tokens, topk, generator=random) < skip] = -1
        self.weights = torch.rand(tokens, topk, generator=random) + 0.1
        self.activation, self.on_input = activation, on_input
        self.layer = ExpertLayer(
            format=format,
            w13=self.w13,
            w2=self.w2,
            activation=activation,
            apply_router_weight_on_input=on_input,
        )

    def run(self) -> torch.Tensor:
        return self.layer(self.x, self.ids, self.weights)

    def reference(self) -> torch.Tensor:
        out = torch.zeros(self.x.shape)
        for expert in range(len(self.w13)):
            token, slot = torch.where(self.ids == expert)
            weight = self.weights[token, slot, None]
            x = self.x[token].float() * (weight if self.on_input else 1)
            gate, up = (x @ self.w13[expert].float().T).chunk(2, dim=-1)
            y = (ACTIVATIONS[self.activation](gate) * up) @ self.w2[expert].float().T
            out.index_add_(0, token, y if self.on_input else y * weight)
        return out


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Relative Frobenius error at most 3e-3, of which rounding the result to bf16 is 1.7e-3.

    A few values do not average out: there the bound is what two roundings to bf16 can do at most.
    """
    assert got.shape == want.shape
    norm = want.norm()
    error = (got.float() - want).norm()
    assert error <= (3e-3 if want.numel() >= 2000 else 8e-3) * norm + 1e-6


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 70),
    hidden=st.sampled_from(SIZES),
    intermediate=st.sampled_from(SIZES),
    experts=st.integers(1, 9),
    topk=st.integers(1, 6),
    format=st.sampled_from(tuple(engine.DTYPES)),
    activation=st.sampled_from(tuple(ACTIVATIONS)),
    on_input=st.booleans(),
    skip=st.sampled_from((0.0, 0.3, 1.0)),
    isa=st.sampled_from(ISAS),
    topology=st.sampled_from(("", "2 nodes x 3,1 cores x 2 threads")),
    seed=st.integers(0, 2**31),
)
def test_against_float32(
    tokens: int,
    hidden: int,
    intermediate: int,
    experts: int,
    topk: int,
    format: str,
    activation: str,
    on_input: bool,
    skip: float,
    isa: str,
    topology: str,
    seed: int,
) -> None:
    use_isa(isa, topology=topology)
    case = Case(
        tokens,
        hidden,
        intermediate,
        experts,
        topk,
        format=format,
        activation=activation,
        on_input=on_input,
        skip=skip,
        seed=seed,
    )
    assert_close(case.run(), case.reference())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", engine.DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize(("hidden", "intermediate"), [(2048, 768), (2047, 33), (33, 2047)])
def test_sizes_of_real_layers(
    isa: str, format: str, tokens: int, hidden: int, intermediate: int
) -> None:
    use_isa(isa)
    case = Case(tokens, hidden, intermediate, 3, 2, format=format)
    assert_close(case.run(), case.reference())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", engine.DTYPES)
def test_other_dtype_of_x(isa: str, format: str) -> None:
    """A layer takes both dtypes; the result has that of x. One more rounding at most."""
    use_isa(isa)
    case = Case(40, 256, 128, 4, 2, format=format)
    case.x = case.x.to(torch.float16 if format == "bf16" else torch.bfloat16)
    got, want = case.run(), case.reference()
    assert got.dtype == case.x.dtype
    assert (got.float() - want).norm() <= 4e-3 * want.norm()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", engine.DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 67])
def test_threads_and_nodes_do_not_change_a_bit(isa: str, format: str, tokens: int) -> None:
    use_isa(isa, threads=1)
    case = Case(tokens, 257, 130, 5, 3, format=format, skip=0.1)
    want = case.run()
    for topology in (
        "1 node x 2 cores x 1 threads",
        "1 node x 5 cores x 2 threads",
        "2 nodes x 3 cores x 2 threads",
        "3 nodes x 4,2,0 cores x 1 threads",
        "4 nodes x 1 cores x 1 threads",
        "8 nodes x 1,2,1,1,1,1,1,1 cores x 1 threads",
        "32 nodes x 1 cores x 1 threads",
    ):
        engine.configure(isa=isa, topology=topology)
        for _ in range(3):
            assert torch.equal(case.run(), want), topology
        engine.configure(isa=isa, topology=topology, threads=1)
        assert torch.equal(case.run(), want), topology


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", engine.DTYPES)
def test_a_token_does_not_depend_on_its_batch(isa: str, format: str) -> None:
    use_isa(isa)
    case = Case(61, 130, 257, 2, 2, format=format)
    together = case.run()
    for t in (0, 17, 60):
        one = case.layer(case.x[t : t + 1], case.ids[t : t + 1], case.weights[t : t + 1])
        assert torch.equal(one[0], together[t])


def test_more_tokens_than_one_pass() -> None:
    """Scratch for 256 MiB of slots is the limit of a pass; this batch needs several."""
    case = Case(9000, 1024, 8, 4, 6)
    assert_close(case.run(), case.reference())


def test_extreme_inputs() -> None:
    """Activations saturate without NaN, and infinities and NaN of x stay what they are."""
    case = Case(4, 64, 32, 2, 1)
    case.x[0] *= 1e4
    case.x[1] *= -1e4
    case.x[2, 3] = float("nan")
    got = case.run()
    assert got[:2].isfinite().all()
    assert got[2].isnan().all()
    assert_close(got[3:], case.reference()[3:])


def test_strided_rows_and_int64_ids() -> None:
    case = Case(9, 100, 64, 4, 2)
    want = case.run()
    wide = torch.zeros(9, 130, dtype=torch.bfloat16)
    wide[:, 5:105] = case.x
    assert torch.equal(case.layer(wide[:, 5:105], case.ids.long(), case.weights), want)


def test_empty_batch() -> None:
    case = Case(0, 64, 32, 2, 2)
    got = case.run()
    assert got.shape == (0, 64)
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.ids.fill_(7), r"topk_ids\[0, 0\] is 7, must be -1 \(skip\) to 3"),
        (lambda c: c.ids.fill_(-2), "is -2"),
        (lambda c: setattr(c, "ids", c.ids.long() + 2**40), "topk_ids"),
        (lambda c: setattr(c, "ids", c.ids.float()), "int32 or int64"),
        (lambda c: setattr(c, "ids", c.ids[:2]), "topk_ids"),
        (lambda c: setattr(c, "weights", c.weights.double()), "topk_weights.*float32"),
        (lambda c: setattr(c, "weights", c.weights[:, :1]), "topk_weights"),
        (lambda c: setattr(c, "x", c.x[:, :63]), "63.*hidden size is 64"),
        (lambda c: setattr(c, "x", c.x.float()), "x must be bfloat16 or float16"),
        (lambda c: setattr(c, "x", c.x[:, ::2]), "contiguous rows"),
    ],
)
def test_wrong_batches(change: object, message: str) -> None:
    case = Case(3, 64, 32, 4, 2)
    change(case)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        case.run()


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {"w13": torch.zeros(2, 8, 16, dtype=dtype), "w2": torch.zeros(2, 16, 4, dtype=dtype)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "int3"}, "format is 'int3', must be one of bf16, fp16"),
        ({"activation": "relu"}, "activation is 'relu', must be one of silu, gelu, gelu_tanh"),
        ({"w13": torch.zeros(2, 8, 16)}, r"w13 is torch.float32, wanted torch.bfloat16"),
        ({"w2": torch.zeros(2, 16, 5, dtype=torch.bfloat16)}, r"w2 has shape \(2, 16, 5\)"),
        ({"w13": torch.zeros(2, 7, 16, dtype=torch.bfloat16)}, "w13 has 7 rows"),
        ({"w13": torch.zeros(8, 16, dtype=torch.bfloat16)}, r"w13 has shape \(8, 16\)"),
        ({"w13": torch.zeros(2, 16, 8, dtype=torch.bfloat16).mT}, "w13 has strides"),
        ({"w13": torch.zeros(2, 8, 16, dtype=torch.bfloat16, device="meta")}, "w13 is on meta"),
        ({"w2_scale": torch.zeros(2)}, "w2_scale was given"),
    ],
)
def test_wrong_layers(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertLayer(**({"format": "bf16"} | weights() | arguments))  # type: ignore[arg-type]


def test_a_destroyed_layer_is_refused() -> None:
    layer = ExpertLayer(format="bf16", w13=weights()["w13"], w2=weights()["w2"])
    handle = layer.handle
    del layer
    x, ids, scale = torch.zeros(1, 16).bfloat16(), torch.zeros(1, 1).int(), torch.ones(1, 1)
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


def test_calls_from_several_threads_take_turns() -> None:
    cases = [Case(m, 130, 64, 4, 2, seed=m) for m in (1, 2, 9, 33)]
    want = [case.run() for case in cases]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(cases[i].run(), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


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


def test_isa_from_the_environment() -> None:
    got = run_python("from lvllm import engine; print(engine.info().isa)", LK_ISA="portable")
    assert got.stdout == "portable\n"
    got = run_python(
        "from lvllm import engine\ntry: engine.info()\nexcept ValueError as e: print(e)",
        LK_ISA="sse9",
    )
    assert got.stdout.startswith('LK_ISA is "sse9", must be one of those this CPU runs: portable')


def test_layers_on_bank_memory() -> None:
    case = Case(5, 100, 60, 3, 2)
    w13 = bank.allocate(case.w13.shape, torch.bfloat16, parts=2)
    w2 = bank.allocate(case.w2.shape, torch.bfloat16)
    layer = ExpertLayer(format="bf16", w13=w13, w2=w2)
    # Filled after the layer was made: it computes on this memory, not on a copy.
    w13.copy_(case.w13)
    w2.copy_(case.w2)
    assert torch.equal(layer(case.x, case.ids, case.weights), case.run())
