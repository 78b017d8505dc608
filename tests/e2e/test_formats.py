"""Quantised checkpoints through LvLLM, against transformers in float32 on the values they mean."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.generate import ONE_PROCESS, Answers, generate
from tests.e2e.test_exactness import Prompts, check_against_reference, prompts
from tests.models.make import make
from tests.models.quantize import SCHEMES, quantize

# Of each way that a process may cut its share out of a checkpoint, one.
SHARDED = ("awq", "compressed_int4_zero_points", "compressed_nvfp4", "fp8_blocks")

Case = tuple[Path, Prompts, Answers]


def run(plain: Path, schemes: Iterable[str], seed: int, tmp: Path, **job: Any) -> dict[str, Case]:
    """Every scheme's answers, from one process: starting vLLM is most of the time."""
    folders = {name: quantize(plain, SCHEMES[name], tmp / name) for name in schemes}
    asked = prompts(seed)
    jobs = [
        {"model": str(quantized), "prompts": asked, "max_tokens": 12} | job
        for quantized, _ in folders.values()
    ]
    answers = generate(jobs, environment=ONE_PROCESS if not job else None)
    return {
        name: (values, asked, answer)
        for (name, (_, values)), answer in zip(folders.items(), answers, strict=True)
    }


@pytest.fixture(scope="module")
def seed() -> int:
    drawn = random.randrange(1 << 30)
    print(f"seed {drawn}")
    return drawn


@pytest.fixture(scope="module")
def generated(seed: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    tmp = tmp_path_factory.mktemp("whole")
    # 128 rows of gate and up are one block of scales, 320 columns two and a half.
    sizes = {"hidden_size": 320, "moe_intermediate_size": 128, "num_key_value_heads": 4}
    plain = make("qwen3_moe", tmp / "plain", seed, mlp_only_layers=[], **sizes)
    return run(plain, SCHEMES, seed, tmp)


@pytest.fixture(scope="module")
def sharded(seed: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    tmp = tmp_path_factory.mktemp("sharded")
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256}
    plain = make("qwen3_moe", tmp / "plain", seed, mlp_only_layers=[], **sizes)
    return run(plain, SHARDED, seed, tmp, tensor_parallel_size=2)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_quantised_experts(scheme: str, generated: dict[str, Case]) -> None:
    check_against_reference(*generated[scheme])


@pytest.mark.parametrize("scheme", SHARDED)
def test_shares_of_two_processes(scheme: str, sharded: dict[str, Case]) -> None:
    check_against_reference(*sharded[scheme])
