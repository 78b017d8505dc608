"""Results of lvllm.engine against float32 PyTorch, on random data and awkward shapes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvllm import engine
from lvllm.engine.weight_formats import FORMATS as STORED
from tests.engine.random_case import BOTH, ISAS, Case
from tests.random_layers import ACTIVATIONS, FORMATS

pytestmark = pytest.mark.usefixtures("default_settings")


SIZES = (1, 2, 7, 15, 16, 17, 31, 32, 33, 50, 64, 65, 100, 130, 257)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `Case`, all formats, activations and ragged sizes among them."""
    format = draw(st.sampled_from(FORMATS))
    activation = draw(st.sampled_from(ACTIVATIONS))
    return {
        "tokens": draw(st.sampled_from((0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 70, 300))),
        "hidden": draw(st.sampled_from(SIZES)),
        "intermediate": draw(st.sampled_from(SIZES)),
        "experts": draw(st.integers(1, 9)),
        "topk": draw(st.integers(1, 6)),
        "format": format,
        "x_dtype": draw(st.sampled_from((torch.bfloat16, torch.float16))),
        "skip": draw(st.sampled_from((0.0, 0.3, 1.0))),
        "seed": draw(st.integers(0, 2**31)),
        "activation": activation,
        "interleaved": activation != "relu2" and draw(st.booleans()),
        "swiglu_alpha": draw(st.sampled_from((1.702, 1.0))),
        "swiglu_beta": draw(st.sampled_from((1.0, 0.0))),
        "swiglu_limit": draw(st.sampled_from((7.0, 0.75))),
        "bias": draw(st.booleans()),
        "bias_dtype": draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32))),
        "apply_router_weight_on_input": draw(st.booleans()),
        "activation_bits": draw(st.sampled_from((None, *STORED[format].activation_bits))),
        "group_size": draw(st.sampled_from((32, 64, 128, -1))),
        "zero": draw(st.booleans()),
        "scale_dtype": draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32))),
        "fp8_scale": draw(st.sampled_from(("block", "channel", "tensor"))),
    }


@settings(max_examples=400, deadline=None)
@given(
    arguments=cases(),
    isa=st.sampled_from(ISAS),
    threads=st.sampled_from((None, 1, 2, 3)),
    topology=st.sampled_from(("", "2 nodes x 3,1 cores x 2 threads")),
)
def test_against_float32(
    arguments: dict[str, Any], isa: str, threads: int | None, topology: str
) -> None:
    engine.configure(isa=isa, threads=threads if topology else None, topology=topology)
    Case(**arguments).check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "bits"), BOTH)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "interleaved"])
def test_every_activation_with_biases(isa: str, format: str, bits: int, activation: str) -> None:
    engine.configure(isa=isa)
    Case(
        66,
        130,
        94,
        4,
        3,
        format=format,
        activation_bits=bits,
        activation="swigluoai" if activation == "interleaved" else activation,
        interleaved=activation == "interleaved",
        bias=True,
        swiglu_limit=1.5,
    ).check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "bits"), BOTH)
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("on_input", [False, True])
def test_dtypes_of_x_and_weights_on_input(
    isa: str, format: str, bits: int, x_dtype: torch.dtype, on_input: bool
) -> None:
    engine.configure(isa=isa)
    Case(
        200,
        256,
        192,
        3,
        2,
        format=format,
        activation_bits=bits,
        x_dtype=x_dtype,
        apply_router_weight_on_input=on_input,
    ).check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "bits"), BOTH)
@pytest.mark.parametrize(("hidden", "intermediate"), [(1024, 768), (2047, 33), (33, 2047)])
def test_sizes_of_real_layers(
    isa: str, format: str, bits: int, hidden: int, intermediate: int
) -> None:
    engine.configure(isa=isa)
    case = Case(64, hidden, intermediate, 3, 2, format=format, activation_bits=bits)
    case.check()
    case.x, case.ids, case.weights = case.x[:1], case.ids[:1], case.weights[:1]
    case.check()


@pytest.mark.parametrize(("format", "bits"), BOTH)
@pytest.mark.parametrize("experts", [1, 2, 512])
def test_from_one_to_512_experts(format: str, bits: int, experts: int) -> None:
    Case(90, 64, 32, experts, 10, format=format, activation_bits=bits).check()


@pytest.mark.parametrize(("format", "bits"), BOTH)
def test_thousands_of_tokens(format: str, bits: int) -> None:
    Case(3000, 130, 66, 4, 3, format=format, activation_bits=bits, skip=0.1).check()


@pytest.mark.parametrize("format", FORMATS)
def test_65536_tokens(format: str) -> None:
    Case(65536, 32, 16, 8, 2, format=format).check()


def test_more_tokens_than_one_pass() -> None:
    """Scratch for 256 MiB of slots is the limit of a pass; this batch needs several."""
    Case(9000, 1024, 8, 4, 6).check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "bits"), BOTH)
def test_extreme_inputs(isa: str, format: str, bits: int) -> None:
    """Activations saturate without NaN, and NaN of x stays what it is, in its own row."""
    engine.configure(isa=isa)
    case = Case(4, 64, 32, 2, 1, format=format, activation_bits=bits)
    case.x[0] *= 1e4
    case.x[1] *= -1e4
    case.x[2, 3] = float("nan")
    case.weights[2] = 1
    got = case.run()
    assert got[:2].isfinite().all()
    assert got[2].isnan().all()
    case.x, case.ids, case.weights = case.x[3:], case.ids[3:], case.weights[3:]
    case.check()
    assert torch.equal(case.run(), got[3:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "bits"), BOTH)
def test_zeros_and_tiny_inputs(isa: str, format: str, bits: int) -> None:
    """A block of zeros or of subnormal numbers has no scale that divides: biases come out."""
    engine.configure(isa=isa)
    case = Case(60, 128, 66, 2, 1, format=format, activation_bits=bits, bias=True)
    case.x[:20] = 0
    case.x[20:40] *= 2.0**-126
    case.x[40:, :64] = 0
    case.check()
    case = Case(1, 128, 66, 2, 1, format=format, activation_bits=bits)
    case.x.zero_()
    assert torch.equal(case.run(), case.x)
