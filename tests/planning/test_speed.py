"""Predicted speed, against arithmetic by hand and against what was measured."""

from dataclasses import replace
from pathlib import Path
from random import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvllm.engine.weight_formats import BLOCK_FORMATS
from lvllm.planning import shape
from lvllm.planning.bits import Bits, FormatShare
from lvllm.planning.hits import EVEN
from lvllm.planning.machine import BLOCKS, CPUS, Machine
from lvllm.planning.placement import Load, Placement
from lvllm.planning.speed import limit, predict
from lvllm.settings.use_weight import UseWeight
from lvllm.units import GIB
from tests.planning.made_up import machine, model

TINY = Path(__file__).parents[2] / "examples/models/tiny-moe"
QWEN3_WITH_5_LAYERS: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 5,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
INT4_EXPERTS = Placement(False, use_weight=UseWeight.INT4, int8_linear=True)


@pytest.mark.parametrize(("users", "measured"), [(1, 35.6), (4, 86.8)])
def test_decoding_that_was_measured(users: int, measured: float) -> None:
    """docs/performance.md, "A whole model": Zen 3 with 2 threads that read 32 GB/s."""
    model = shape.of_config(QWEN3_WITH_5_LAYERS, "x")
    here = Machine(
        cores=2,
        nodes=1,
        memory_bytes=24 * GIB,
        read_gb_per_s=32,
        giga_products_per_core=CPUS["avx2"],
    )
    load = Load(prompt=2048, answer=16, users=users)
    speed = predict(model, here, INT4_EXPERTS, load)
    assert speed.decode_rate == pytest.approx(measured, rel=0.25)
    assert speed.prefill_rate == pytest.approx(269, rel=0.25)


@pytest.mark.parametrize(("users", "measured"), [(1, 26.0), (4, 58.1)])
def test_a_server_that_was_measured(users: int, measured: float) -> None:
    """The same model and machine on another day, by `lvllm bench` with prompts of 512 tokens."""
    here = _two_cores(25.9, int4=51.5, int8=31.6, bf16=42.3)
    model = shape.of_config(QWEN3_WITH_5_LAYERS, "x")
    load = Load(prompt=512, answer=48, users=users)
    speed = predict(model, here, INT4_EXPERTS, load)
    assert speed.decode_rate == pytest.approx(measured, rel=0.25)
    assert speed.prefill_rate == pytest.approx(272, rel=0.25)


@pytest.mark.parametrize(("users", "measured"), [(1, 91.6), (4, 321), (16, 941)])
def test_the_demo_models_server_that_was_measured(users: int, measured: float) -> None:
    """Its experts are so small that vLLM's own steps limit it."""
    here = _two_cores(29.7, int4=40.9, int8=25.7, bf16=28.0)
    model = shape.of_folder(TINY, "tiny")
    speed = predict(model, here, Placement(False), Load(prompt=513, answer=128, users=users))
    assert limit(speed.decode) == "vLLM's own steps"
    assert speed.decode_rate == pytest.approx(measured, rel=0.25)
    assert speed.prefill_rate == pytest.approx(11172, rel=0.25)


def test_a_front_process_with_cores_of_its_own_costs_nothing() -> None:
    few, many = (
        predict(model(), machine(cores=cores), Placement(False), Load(users=8)).decode
        for cores in (4, 5)
    )
    own = "vLLM's own steps"
    assert few[own] - many[own] == pytest.approx(2.7e-3 + 8 * 0.43e-3)


def _two_cores(gb_per_s: float, **products: float) -> Machine:
    return Machine(
        cores=2,
        nodes=1,
        memory_bytes=24 * GIB,
        read_gb_per_s=gb_per_s,
        giga_products_per_core=products,
    )


def test_reading_limits_a_token_and_arithmetic_a_prompt() -> None:
    here = machine(gb_per_s=100)
    speed = predict(model(), here, Placement(False), Load(prompt=2048, users=1))
    read = 7 * 6 * 10_000_000 * 2 / (0.88 * 100e9) + 7 * 20e-6
    assert speed.decode["experts: memory bandwidth"] == pytest.approx(read)
    assert limit(speed.decode) == "experts: memory bandwidth"
    products = 7 * 2048 * 6 * 10_000_000 / (16 * 170e9) + 7 * 20e-6
    assert speed.prefill["experts: arithmetic"] == pytest.approx(products)


@pytest.mark.parametrize(("isa", "timed"), [("avx2", "avx2"), ("avx512_bf16", "avx512_vnni")])
def test_experts_in_blocks_are_as_slow_as_their_shares(isa: str, timed: str) -> None:
    """Half of the down projections are in another type."""
    here, load = machine(gb_per_s=100).model_copy(update={"isa": isa}), Load(prompt=2048)
    blocks = BLOCKS[timed]
    parts = (FormatShare("q4_k", 5 / 6, 4.5), FormatShare("iq1_s", 1 / 6, 1.5625))
    mixed = replace(model(), bits=Bits("q4_k", 4.01, 16, parts))
    found = predict(mixed, here, Placement(False), load)
    rates = [here.cores * 1e9 * blocks[part.format].products * 249 for part in parts]
    products = 7 * 2048 * 6 * 10_000_000
    seconds = products * (5 / 6 / rates[0] + 1 / 6 / rates[1]) + 7 * 20e-6
    assert found.prefill["experts: arithmetic"] == pytest.approx(seconds)
    # Unpacking one type takes longer than reading its few bits.
    assert blocks["iq1_s"].least_bits > 1.5625
    read = max(4.5, blocks["q4_k"].least_bits) * 5 / 6 + blocks["iq1_s"].least_bits / 6
    seconds = 7 * 6 * 10_000_000 * read / 8 / (0.88 * 100e9) + 7 * 20e-6
    assert found.decode["experts: memory bandwidth"] == pytest.approx(seconds)


def test_every_type_has_a_rate() -> None:
    for blocks in BLOCKS.values():
        assert set(blocks) == set(BLOCK_FORMATS)


def test_users_share_the_experts_that_they_choose() -> None:
    here = machine(cores=200)
    rates = [
        predict(model(), here, Placement(False), Load(users=n)).decode_rate for n in (1, 4, 16)
    ]
    assert rates[0] < rates[1] < 4 * rates[0]
    assert rates[1] < rates[2] < 4 * rates[1]


def test_a_streamed_prompt_takes_what_the_bus_takes() -> None:
    here = machine(gpus=1)  # 25 GB/s
    how = Placement(True, streamed_from=1)
    speed = predict(model(), here, how, Load(prompt=2048, batch=2048))
    assert speed.prefill["streamed experts: bus"] == pytest.approx(7 * 64 * 10_000_000 * 2 / 25e9)
    twice = predict(model(), here, how, Load(prompt=4096, batch=2048))
    assert twice.prefill["streamed experts: bus"] == pytest.approx(
        2 * speed.prefill["streamed experts: bus"]
    )


def test_only_batches_from_the_threshold_on_are_streamed() -> None:
    here = machine(gpus=1)
    speed = predict(model(), here, Placement(True, streamed_from=100), Load(prompt=100, users=99))
    assert "streamed experts: bus" in speed.prefill
    assert not any("streamed" in name for name in speed.decode)
    assert any(name.startswith("experts:") for name in speed.decode)


def test_a_cache_saves_the_cpus_reads() -> None:
    """What it saves, the GPU reads at the same time."""
    here, of = machine(gpus=1, gb_per_s=100), model(experts=128, chosen=8)
    each = 10_000_000 * 2
    how = Placement(True, cache=each * 7 * 32)
    plain = predict(of, here, Placement(True), Load()).decode
    speed = predict(of, here, how, Load()).decode
    saved = EVEN[1][3]
    reading = 7 * 8 * each / (0.88 * 100e9)
    assert plain["experts: memory bandwidth"] == pytest.approx(reading + 7 * 20e-6)
    assert speed["experts: memory bandwidth"] == pytest.approx((1 - saved) * reading)
    over = "handing over to the CPU"
    assert speed[over] == pytest.approx(plain[over] + 7 * (20e-6 + 20e-6))
    # Where the CPU has next to nothing left, the GPU's reads are what takes the time.
    fast = here.model_copy(update={"read_gb_per_s": 1e5})
    speed = predict(of, fast, how, Load()).decode
    read = 7 * 8 * each / (0.8 * 1008e9)
    assert speed["cached experts: the GPU's memory"] == pytest.approx(saved * read)
    assert not any(name.startswith("experts:") for name in speed)


def test_cached_experts_are_not_copied() -> None:
    here, part = machine(gpus=1), random()
    slots = int(part * 7 * 64)
    how = Placement(True, streamed_from=1, cache=10_000_000 * 2 * (slots + 0.5))
    plain = predict(model(), here, replace(how, cache=0), Load()).prefill["streamed experts: bus"]
    found = predict(model(), here, how, Load()).prefill
    limit = max(
        plain * (1 - slots / (7 * 64)),
        7 * 2048 * 6 * 10_000_000 / (0.5 * 165e12 / 2),
    )
    assert sum(some for name, some in found.items() if "streamed" in name) == pytest.approx(limit)


@given(st.floats(0, 20), st.floats(0, 20), st.integers(1, 64), st.integers(0, 6))
def test_a_larger_cache_never_leaves_the_cpu_more(
    one: float, other: float, users: int, resident: int
) -> None:
    small, large = (
        predict(
            model(experts=128, chosen=8),
            machine(gpus=2),
            Placement(True, resident, cache=size * GIB),
            Load(users=users),
        ).decode
        for size in sorted((one, other))
    )
    assert _of_cpu(large) <= _of_cpu(small) + 1e-9


def _of_cpu(decode: dict[str, float]) -> float:
    return sum(seconds for name, seconds in decode.items() if name.startswith("experts:"))
