"""Linear layers on the engine: their accuracy, determinism and refusals."""

import pytest
import torch

from lvllm import engine
from lvllm.engine import LinearLayer
from tests.engine.random_case import ISAS

pytestmark = pytest.mark.usefixtures("default_settings")

SHAPES = ((1, 1), (70, 130), (257, 96), (64, 515))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("int8", [False, True])
def test_the_product_is_that_of_float32(isa: str, dtype: torch.dtype, int8: bool) -> None:
    """Rounding y, and x with bf16 pairs, to bf16 makes errors of 1.7e-3; the bound is 4e-3.

    A weight in int8 is off by up to 1/254 of the largest in its row, which is at most 4 times their
    usual size here: 0.9e-2 of it on average.
    """
    engine.configure(isa=isa)
    own = engine.OWN_FORMAT[dtype]
    for rows, columns in SHAPES:
        weight = torch.randn(rows, columns).to(dtype)
        layer = LinearLayer(weight, format="int8" if int8 else own, activation_bits=16)
        for tokens in (1, 5, 130):
            x = torch.randn(tokens, columns).to(dtype)
            got, want = layer(x), x.float() @ weight.float().T
            assert got.dtype == dtype
            assert got.shape == want.shape
            # Of few numbers, errors do not average out.
            spread = 4 if tokens * rows < 500 or columns < 32 else 1
            bound = spread * (2e-2 if int8 else 4e-3)
            assert (got.float() - want).norm() < bound * (
                want.norm() + 0.3 * (tokens * rows) ** 0.5
            )


def test_a_token_does_not_depend_on_its_batch_or_threads() -> None:
    weight, x = torch.randn(200, 96).bfloat16(), torch.randn(70, 96).bfloat16()
    for format in ("bf16", "int8"):
        engine.configure()
        layer = LinearLayer(weight, format=format)
        whole = layer(x)
        engine.configure(threads=3, topology="2 nodes x 2 cores x 1 threads")
        assert torch.equal(layer(x), whole)
        assert torch.equal(torch.cat([layer(row[None]) for row in x]), whole)


def test_x_may_have_any_number_of_dimensions() -> None:
    layer = LinearLayer(torch.randn(70, 32).bfloat16(), format="bf16")
    x = torch.randn(2, 3, 32).bfloat16()
    assert torch.equal(layer(x).view(6, 70), layer(x.view(6, 32)))
    assert layer(x[:0]).shape == (0, 3, 70)
    strided = torch.randn(3, 64).bfloat16()[:, :32]
    assert torch.equal(layer(strided), layer(strided.contiguous()))


def test_the_weight_given_is_left_alone() -> None:
    weight = torch.randn(70, 32).bfloat16()
    before = weight.clone()
    LinearLayer(weight, format="bf16")(torch.randn(3, 32).bfloat16())
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("weight", "format", "message"),
    [
        (torch.ones(4, 4), "bf16", "the weight's dtype is torch.float32, must be one of"),
        (torch.ones(4, 4).half(), "bf16", "format is 'bf16', must be one of fp16, int8"),
        (torch.ones(4).half(), "fp16", r"weight has shape \(4,\), wanted \[rows, columns\]"),
        (torch.ones(0, 4).half(), "fp16", r"weight has shape \(0, 4\), wanted"),
        (torch.full((4, 4), torch.nan).half(), "int8", "NaN"),
        (torch.ones(4, 4).half().to("meta"), "fp16", "weight is on meta, wanted the CPU"),
        (torch.ones(4, 4).half().to_sparse(), "fp16", "weight is torch.sparse_coo, wanted a dense"),
    ],
)
def test_wrong_weights_are_refused(weight: torch.Tensor, format: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearLayer(weight, format=format)


def test_a_wrong_x_is_refused() -> None:
    layer = LinearLayer(torch.ones(4, 6).bfloat16(), format="bf16")
    with pytest.raises(ValueError, match=r"x is torch\.sparse_coo, wanted a dense tensor"):
        layer(torch.ones(2, 6).bfloat16().to_sparse())
    with pytest.raises(ValueError, match="x has rows of 5 elements, the layer's input size is 6"):
        layer(torch.ones(2, 5).bfloat16())
    with pytest.raises(ValueError, match="x must be bfloat16 or float16"):
        layer(torch.ones(2, 6))
    with pytest.raises(ValueError, match="x is a single number"):
        layer(torch.tensor(1.0).bfloat16())


def test_the_engine_forgets_a_layer_with_its_object() -> None:
    layer = LinearLayer(torch.ones(4, 6).bfloat16(), format="bf16")
    handle = layer.handle
    del layer
    with pytest.raises(ValueError, match="names no linear layer"):
        engine.raw_ops.linear(torch.ones(2, 6).bfloat16(), handle, 4)
