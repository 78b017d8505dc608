"""The emulation of `benchmarks.activation_bits` computes what the engine does."""

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.activation_bits import (
    A_TOKEN,
    CASES,
    Blocks,
    Weights,
    in_engine,
    in_float,
    variants,
)
from lvllm import engine
from tests.random_layers import Random

WITHOUT_VNNI = ("portable", "avx2", "avx512")


def random_experts(random: Random, hidden: int, intermediate: int) -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(
        num_experts=3, hidden_size=hidden, moe_intermediate_size=intermediate, hidden_act="silu"
    )
    experts = Qwen3MoeExperts(config)
    for weight in (experts.gate_up_proj, experts.down_proj):
        weight.data = random.normal(*weight.shape) * weight.shape[-1] ** -0.5
    return experts


@pytest.mark.parametrize("weights", CASES, ids=str)
def test_the_engine_has_the_blocks_that_are_emulated(weights: Weights) -> None:
    """A few activations may be rounded to the other side, as sums are in another order.

    Other blocks, exact activations and a scale a token are at least 5e-3 away.
    """
    isa = engine.info().isa
    random = Random(17)
    experts = random_experts(random, 512, 256)
    x = random.normal(60, 512).half().float()
    ids, by_router = random.integers(0, 3, 60, 2), random.uniform(0.1, 1.1, 60, 2)

    def emulated(blocks: Blocks | None) -> torch.Tensor:
        return in_float(weights, blocks)(experts)(x, ids, by_router)

    blocks = weights.blocks(vnni=isa not in WITHOUT_VNNI) if isa != "portable" else None
    got = in_engine(weights, 8)(experts)(x, ids, by_router)
    want = emulated(blocks)
    assert (got - want).norm() <= 2e-3 * want.norm()
    if blocks is not None:
        for other in (None, A_TOKEN, (blocks[0] // 2, blocks[1]), (blocks[0], blocks[1] // 2)):
            assert (got - emulated(other)).norm() > 4e-3 * want.norm()


def test_variants() -> None:
    found = {str(weights): dict(variants(weights)) for weights in CASES}
    assert found["int8"] == {
        "16 bits": None,
        "8 bits, blocks of 256 and 32, VNNI": (256, 32),
        "8 bits, a scale a token": A_TOKEN,
    }
    assert found["int4, groups of 128"] == {
        "16 bits": None,
        "8 bits, blocks of 128 and 32, VNNI": (128, 32),
        "8 bits, blocks of 64 and 32, AVX2": (64, 32),
        "8 bits, a scale a token": A_TOKEN,
    }
    assert list(found["nvfp4"].values()) == [None, (16, 16), A_TOKEN]
