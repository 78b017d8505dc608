"""Quantised checkpoints through LvLLM, against transformers in float32 on the values they mean."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.generate import ONE_PROCESS, generate
from tests.e2e.test_exactness import check_against_reference, prompts
from tests.models.make import make
from tests.models.quantize import SCHEMES, quantize


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every scheme's answers, from one process: starting vLLM is most of the time."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    # 128 rows of gate and up are one block of scales, 320 columns two and a half.
    plain = make(
        "qwen3_moe",
        tmp_path_factory.mktemp("models") / "plain",
        seed,
        hidden_size=320,
        moe_intermediate_size=128,
        mlp_only_layers=[],
        num_key_value_heads=4,
    )
    folders = {
        name: quantize(plain, scheme, tmp_path_factory.mktemp(name))
        for name, scheme in SCHEMES.items()
    }
    asked = prompts(seed)
    jobs = [
        {"model": str(quantized), "prompts": asked, "max_tokens": 12}
        for quantized, _ in folders.values()
    ]
    answers = generate(jobs, environment=ONE_PROCESS)
    return {
        name: (values, asked, answer)
        for (name, (_, values)), answer in zip(folders.items(), answers, strict=True)
    }


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_quantised_experts(scheme: str, generated: dict[str, tuple[Path, Any, Any]]) -> None:
    check_against_reference(*generated[scheme])
