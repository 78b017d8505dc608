"""Tests experts on copied weights, against float32 on dequantised weights."""

from random import randrange
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvllm.engine.weight_formats import BLOCK_FORMATS
from lvllm.gpu import groups, streamed
from lvllm.gpu.convert import convert
from lvllm.gpu.ring import StagingRing
from lvllm.gpu.stand_in import StandInAccelerator
from tests.gpu.streams import Recorded
from tests.random_layers import ACTIVATIONS, FORMATS, FOUR_BIT, Random, random_layer

LAYERS = {
    "experts": st.integers(1, 5),
    "sizes": st.tuples(*[st.sampled_from((8, 16, 24, 33, 64, 65, 97, 130))] * 2),
    "group_size": st.sampled_from((32, 64, 128, -1)),
    "zero": st.booleans(),
    "fp8_scale": st.sampled_from(("block", "channel", "tensor")),
    "scale_dtype": st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    "seed": st.integers(0, 2**31),
}


def made(
    format: str, activation: str, sizes: tuple[int, int], experts: int, seed: int, **more: Any
) -> tuple[Random, Any]:
    random = Random(seed)
    hidden, intermediate = (2 * size if format in FOUR_BIT else size for size in sizes)
    if activation == "interleaved":
        activation, more = "swigluoai", more | {"interleaved": True, "fp8_scale": "channel"}
    return random, random_layer(
        random, format, experts, hidden, intermediate, activation=activation, **more
    )


def run(layer: Any, *batch: torch.Tensor, **how: Any) -> torch.Tensor:
    """Compute a batch with the layer's experts streamed through a ring."""
    accelerator = StandInAccelerator()
    try:
        ring = StagingRing(accelerator, {3: layer.tensors}, 0, 1 << 30)
        return streamed.run(layer, ring, 3, *batch, **how)
    finally:
        accelerator.close()


@settings(max_examples=80, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    activation=st.sampled_from((*ACTIVATIONS, "interleaved")),
    bias=st.booleans(),
    on_input=st.booleans(),
    tokens=st.sampled_from((0, 1, 2, 7, 33)),
    scratch=st.sampled_from((1, 40_000, 1 << 30)),
    sums=st.sampled_from((1, 4000, 1 << 30)),
    group=st.sampled_from((1, 30_000, 1 << 30)),
    **LAYERS,
)
def test_it_computes_the_expert_block(
    format: str,
    on_input: bool,
    tokens: int,
    scratch: int,
    sums: int,
    group: int,
    seed: int,
    experts: int,
    **how: Any,
) -> None:
    random, layer = made(
        format, experts=experts, seed=seed, apply_router_weight_on_input=on_input, **how
    )
    engine_layer = layer.make()
    dtype = torch.float16 if format == "fp16" else torch.bfloat16
    x = random.normal(tokens, engine_layer.hidden_size).to(dtype)
    ids = random.integers(-1, experts, tokens, 3)
    weights = random.uniform(0.1, 1, tokens, 3)
    parts: list[tuple[int, list[int]]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "GROUP_BYTES", group)
        got = run(
            engine_layer,
            x,
            ids.int(),
            weights,
            scratch_bytes=scratch,
            sum_bytes=sums,
            count=lambda tokens, counts: parts.append((tokens, counts)),
        )
    assert sum(tokens for tokens, _ in parts) == tokens
    wanted = ids[ids >= 0].flatten().bincount(minlength=experts).tolist()
    assert [sum(counts) for counts in zip(*(counts for _, counts in parts), strict=True)] == wanted
    assert got.shape == x.shape
    assert got.dtype == dtype
    want = layer.reference(x, ids, weights)
    # Weights, x times weight, products, activation and result are rounded to 8 bits of mantissa,
    # each by 2^-9 / sqrt(3) of its size. In sums of few numbers, these errors may add up, and those
    # of a narrow intermediate are in every result.
    many = want.numel() > 500 and min(how["sizes"]) >= 32
    bound = 8e-3 if many else 2e-2
    assert torch.linalg.norm(got.float() - want) <= bound * torch.linalg.norm(want) + 1e-6


@pytest.mark.parametrize("format", FORMATS)
def test_it_agrees_with_the_engine(format: str) -> None:
    random, layer = made(format, "silu", (96, 160), experts=7, seed=11)
    engine_layer = layer.make(activation_bits=16)
    x = random.normal(50, engine_layer.hidden_size).to(torch.bfloat16)
    ids, weights = random.integers(0, 7, 50, 4), random.uniform(0, 1, 50, 4)
    got = run(engine_layer, x, ids, weights).float()
    want = engine_layer(x, ids, weights).float()
    assert torch.linalg.norm(got - want) <= 6e-3 * torch.linalg.norm(want)


@pytest.mark.parametrize(
    ("gate", "up", "down"),
    [
        ("q4_k", None, "q6_k"),
        ("iq2_xxs", None, "q3_k"),
        ("q5_0", None, "int8"),
        ("mxfp4", None, "q5_1"),
        ("bf16", None, "q4_k"),
        ("q4_k", "q6_k", "q4_k"),
        ("int8", "iq3_s", "bf16"),
    ],
)
def test_it_computes_the_types_of_gguf(gate: str, up: str | None, down: str) -> None:
    draw = Random(randrange(1 << 30))
    formats = {gate, up or gate, down}
    step = max(BLOCK_FORMATS[of].block_weights for of in formats & BLOCK_FORMATS.keys())
    hidden, intermediate = (step * draw.integers(1, 512 // step + 1, 2)).tolist()
    layer = random_layer(
        draw, gate, 4, hidden, intermediate, w3_format=up, w2_format=down, group_size=32
    )
    engine_layer = layer.make()
    x = draw.normal(30, hidden).to(torch.bfloat16)
    ids, weights = draw.integers(-1, 4, 30, 2), draw.uniform(0.1, 1, 30, 2)
    got = run(engine_layer, x, ids.int(), weights).float()
    want = layer.reference(x, ids, weights)
    assert torch.linalg.norm(got - want) <= 8e-3 * torch.linalg.norm(want)


def test_only_the_last_part_copies_ahead() -> None:
    """What another part had copied ahead would be dropped, and copied again."""
    random, first = made("bf16", "silu", (16, 24), experts=4, seed=3)
    layers = {3: first.make(), 5: made("bf16", "silu", (16, 24), experts=4, seed=4)[1].make()}
    x, ids = random.normal(30, 16).bfloat16(), random.integers(0, 4, 30, 3)
    accelerator = Recorded()
    ring = StagingRing(accelerator, {n: of.tensors for n, of in layers.items()}, 1, 1 << 30)
    streamed.run(layers[3], ring, 3, x, ids, random.uniform(0, 1, 30, 3), sum_bytes=10 * 4 * 16)
    ring.settle()
    accelerator.close()
    copied = {
        number: sum(
            source.data_ptr() == of.tensors["w13"].data_ptr() for source in accelerator.sources
        )
        for number, of in layers.items()
    }
    assert copied == {3: 3, 5: 1}


@pytest.mark.parametrize("wrong", [-2, 4, 1000])
def test_an_id_that_is_no_expert_is_refused(wrong: int) -> None:
    random, layer = made("bf16", "silu", (16, 24), experts=4, seed=3)
    engine_layer = layer.make()
    x = random.normal(5, engine_layer.hidden_size).to(torch.bfloat16)
    ids, weights = random.integers(-1, 4, 5, 3), random.uniform(0, 1, 5, 3)
    ids[3, 1] = wrong
    with pytest.raises(ValueError, match=rf"^topk_ids has {wrong}, must be -1 or in \[0, 4\)$"):
        run(engine_layer, x, ids, weights)


@settings(max_examples=60, deadline=None)
@given(format=st.sampled_from(FORMATS), parts=st.sampled_from(("silu", "relu2")), **LAYERS)
def test_conversion_gives_the_products_of_weights_and_scales(
    format: str, parts: str, experts: int, seed: int, **how: Any
) -> None:
    _, layer = made(format, parts, experts=experts, seed=seed, **how)
    engine_layer = layer.make()
    some = range(experts // 2, experts)
    for name in ("w13", "w2"):
        got = convert(engine_layer, engine_layer.tensors, name, some, torch.bfloat16)
        want = layer.dequantised(name)[some.start :].to(torch.bfloat16)
        assert torch.equal(got, want)


@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_conversion_gives_the_values_of_blocks(format: str) -> None:
    draw, step = Random(randrange(1 << 30)), BLOCK_FORMATS[format].block_weights
    hidden, intermediate = (step * draw.integers(1, 512 // step + 1, 2)).tolist()
    layer = random_layer(draw, format, 3, hidden, intermediate)
    engine_layer = layer.make()
    for name in ("w13", "w2"):
        got = convert(engine_layer, engine_layer.tensors, name, range(1, 3), torch.bfloat16)
        assert torch.equal(got, layer.dequantised(name)[1:].to(torch.bfloat16))
