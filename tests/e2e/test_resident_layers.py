"""Layers whose experts stay with vLLM, on its CPU platform in the place of a GPU."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.generate import ONE_PROCESS, generate
from tests.e2e.test_exactness import check_against_reference, prompts
from tests.models.make import make

# Experts in layers 0, 2 and 3, and in 3 and 4. The first and the last of a model are resident.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3_moe": ({"num_hidden_layers": 4}, "0,3"),
    "deepseek_v3": ({"num_hidden_layers": 5, "first_k_dense_replace": 3}, "3"),
}


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every model's answers, from one process."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    tmp = tmp_path_factory.mktemp("models")
    folders = {name: make(name, tmp / name, seed, **how) for name, (how, _) in MODELS.items()}
    asked = prompts(seed)
    jobs = [
        {
            "model": str(folders[name]),
            "prompts": asked,
            "max_tokens": 12,
            "additional_config": {"lvllm": {"gpu_resident_moe_layers": layers}},
        }
        for name, (_, layers) in MODELS.items()
    ]
    answers = generate(jobs, environment=ONE_PROCESS | {"LVLLM_ACCELERATOR": "host"})
    return {
        name: (folders[name], asked, answer) for name, answer in zip(MODELS, answers, strict=True)
    }


@pytest.mark.parametrize("name", MODELS)
def test_some_layers_of_both(name: str, generated: dict[str, tuple[Path, Any, Any]]) -> None:
    folder, asked, answers = generated[name]
    check_against_reference(folder, asked, answers)
