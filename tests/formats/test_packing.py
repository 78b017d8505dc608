"""lvllm.formats.packing against other packers: loops here, compressed-tensors, vLLM."""

from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvllm.formats import packing
from tests.random_layers import Random, along_k, nibbles

compressed = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
quant_utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.quant_utils")
scalar_types = pytest.importorskip("vllm.scalar_type").scalar_types

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
IN_ORDER = tuple(range(8))

examples = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)
eights = st.integers(1, 9).map(lambda n: 8 * n)
counts = st.integers(1, 40)


def codes_of(seed: int, rows: int, columns: int, bits: int = 4) -> torch.Tensor:
    return Random(seed).integers(0, 2**bits, rows, columns).int()


def word_of(codes: Iterable[int], bits: int) -> int:
    """The int32 that holds these codes, the first in its lowest bits."""
    word = sum(code << (bits * lane) for lane, code in enumerate(codes))
    return word - 2**32 if word >= 2**31 else word


def pack_columns(
    codes: torch.Tensor, bits: int = 4, order: tuple[int, ...] = IN_ORDER
) -> torch.Tensor:
    """int32 [A, B] of codes -> int32 [A, B * bits / 32], `order` saying which code comes when."""
    per_word = 32 // bits
    return torch.tensor(
        [
            [
                word_of((row[first + at] for at in order[:per_word]), bits)
                for first in range(0, len(row), per_word)
            ]
            for row in codes.tolist()
        ],
        dtype=torch.int32,
    )


def pack_rows(codes: torch.Tensor, bits: int = 4) -> torch.Tensor:
    # As loaded: `contiguous` would leave a single row with the strides of a column.
    return pack_columns(codes.t(), bits).t().clone(memory_format=torch.contiguous_format)


def equal(result: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> bool:
    assert result.dtype == dtype
    return torch.equal(result.int(), wanted.int())


@examples
@given(pairs=counts, rows=eights, seed=seeds)
def test_awq_weights(pairs: int, rows: int, seed: int) -> None:
    codes = codes_of(seed, rows, 2 * pairs)
    qweight = pack_columns(codes.t(), order=AWQ_ORDER)
    assert torch.equal(qweight, quant_utils.awq_pack(codes.t(), 4, 2 * pairs, rows))
    result = packing.awq_int4(qweight)
    assert result.is_contiguous()
    assert result.shape == (rows, pairs)
    assert equal(nibbles(result), codes, torch.uint8)


@examples
@given(groups=counts, rows=eights, seed=seeds)
def test_zero_points_and_scales(groups: int, rows: int, seed: int) -> None:
    zero = codes_of(seed, rows, groups)
    awq = pack_columns(zero.t(), order=AWQ_ORDER)
    assert torch.equal(awq, quant_utils.awq_pack(zero.t(), 4, groups, rows))
    result = packing.awq_zero(awq)
    assert result.is_contiguous()
    assert equal(result, zero, torch.uint8)

    scale = Random(seed).normal(rows, groups).half()
    result = packing.group_scale(scale.t().contiguous())
    assert result.is_contiguous()
    assert torch.equal(result, scale)


@examples
@given(groups=counts, words=st.integers(1, 9), seed=seeds)
def test_gptq_zero_points(groups: int, words: int, seed: int) -> None:
    """Version 1 has them less one, version 2 as they are."""
    for bits, unpack, taken in ((4, packing.gptq_zero, 0), (8, packing.gptq_zero8, 128)):
        zero = codes_of(seed, words * 32 // bits, groups, bits)
        v2 = pack_columns(zero.t(), bits)
        kind = getattr(scalar_types, f"uint{bits}")
        assert torch.equal(v2, quant_utils.pack_quantized_values_into_int32(zero.t(), kind, 1))
        # Zero points of 0 borrow from their neighbours, or were never written.
        v1 = v2 - sum(1 << shift for shift in range(0, 32, bits))
        above_0 = zero.clamp(min=1)
        for result, wanted in (
            (unpack(v2, v2=True), zero),
            (unpack(v1), zero),
            (unpack(pack_columns(above_0.t() - 1, bits)), above_0),
        ):
            assert result.is_contiguous()
            assert equal(result, wanted - taken, torch.uint8 if bits == 4 else torch.int8)


@examples
@given(words=counts, rows=counts, bits=st.sampled_from((4, 8)), seed=seeds)
def test_gptq_weights(words: int, rows: int, bits: int, seed: int) -> None:
    inputs = words * 32 // bits
    codes = codes_of(seed, rows, inputs, bits)
    qweight = pack_rows(codes.t(), bits)
    assert torch.equal(qweight, quant_utils.gptq_pack(codes.t(), bits, inputs, rows))
    before = qweight.clone()
    if bits == 4:
        result = packing.gptq_int4(qweight)
        assert equal(nibbles(result), codes, torch.uint8)
    else:
        result = packing.gptq_int8(qweight)
        assert equal(result, codes - 128, torch.int8)
    assert result.is_contiguous()
    assert torch.equal(qweight, before)


@examples
@given(rows=counts, groups=counts, seed=seeds)
def test_compressed_zero_points(rows: int, groups: int, seed: int) -> None:
    zero = codes_of(seed, rows, groups)
    packed = compressed.pack_to_int32((zero - 8).to(torch.int8), 4, packed_dim=0)
    for layout in (packed, packed.contiguous()):
        result = packing.compressed_zero(layout, rows)
        assert result.is_contiguous()
        assert equal(result, zero, torch.uint8)
    zero = codes_of(seed, rows, groups, 8) - 128
    packed = compressed.pack_to_int32(zero.to(torch.int8), 8, packed_dim=0)
    for layout in (packed, packed.contiguous()):
        result = packing.compressed_zero8(layout, rows)
        assert result.is_contiguous()
        assert equal(result, zero, torch.int8)


def test_compressed_layers_mean_what_the_library_says() -> None:
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    arguments = quantization.QuantizationArgs(
        num_bits=4, symmetric=False, strategy="group", group_size=16
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    random = Random()
    state = base.PackedQuantizationCompressor.compress(
        {
            "weight": random.normal(20, 48),
            "weight_scale": random.uniform(0.1, 0.3, 20, 3),
            "weight_zero_point": random.integers(-8, 8, 20, 3).to(torch.int8),
        },
        scheme,
    )
    codes = nibbles(state["weight_packed"].view(torch.uint8))
    zero = packing.compressed_zero(state["weight_zero_point"], 20)
    scale = state["weight_scale"]
    result = (codes.float() - along_k(zero, 16, 48)) * along_k(scale, 16, 48)
    wanted = base.PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(result, wanted)


@pytest.mark.parametrize(
    "function",
    [
        packing.awq_int4,
        packing.awq_zero,
        packing.gptq_int4,
        packing.gptq_int8,
        packing.gptq_zero,
        packing.gptq_zero8,
        lambda words: packing.compressed_zero(words, 48),
        lambda words: packing.compressed_zero8(words, 24),
    ],
)
def test_parts_of_larger_tensors(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """As tensor parallelism cuts them out."""
    part = Random().integers(-(2**31), 2**31, 9, 11).int()[2:8, 3:8]
    assert torch.equal(function(part), function(part.contiguous()))


WORDS = torch.zeros(6, 5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: packing.awq_int4(WORDS.half()),
            "qweight is float16 [6, 5], wanted int32 [K, N/8]",
        ),
        (
            lambda: packing.awq_int4(WORDS[1:]),
            "qweight is int32 [5, 5], wanted int32 [K, N/8] with an even K",
        ),
        (lambda: packing.awq_zero(WORDS[0]), "qzeros is int32 [5], wanted int32 [G, N/8]"),
        (lambda: packing.gptq_int4(WORDS[None]), "qweight is int32 [1, 6, 5], wanted int32 [K/8,"),
        (lambda: packing.gptq_int8(WORDS.long()), "qweight is int64 [6, 5], wanted int32 [K/4, N]"),
        (lambda: packing.gptq_zero(WORDS.byte()), "qzeros is uint8 [6, 5], wanted int32 [G, N/8]"),
        (lambda: packing.gptq_zero8(WORDS[0]), "qzeros is int32 [5], wanted int32 [G, N/4]"),
        (lambda: packing.group_scale(WORDS[0].half()), "scales is float16 [5], wanted [G, N]"),
        (
            lambda: packing.compressed_zero(WORDS.char(), 48),
            "weight_zero_point is int8 [6, 5], wanted int32 [N/8, G]",
        ),
        (
            lambda: packing.compressed_zero(WORDS, 49),
            "weight_zero_point is int32 [6, 5], wanted [7, G] of N=49",
        ),
    ],
)
def test_refusals(call: Callable[[], torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
