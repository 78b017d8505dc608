"""Ways of running that must not change a token."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.generate import ONE_PROCESS, TINY, Job, generate
from tests.models.make import VOCABULARY, make


@pytest.fixture(scope="module")
def job() -> Job:
    """Prompts for the demo model, whose probabilities are far from ties."""
    draw = random.Random(3)
    prompts = [[draw.randrange(3, 40) for _ in range(n)] for n in (3, 18, 41)]
    return {"model": str(TINY), "prompts": prompts, "max_tokens": 12}


@pytest.fixture(scope="module")
def plain(job: Job) -> Any:
    """The answers with default settings, from vLLM's usual worker process."""
    return generate([job])[0]


def tokens(answers: Any) -> list[list[int]]:
    return [answer["tokens"] for answer in answers]


def test_switched_off_is_stock_vllm_bit_for_bit(job: Job) -> None:
    off = generate([job], enabled=False, environment=ONE_PROCESS)
    # An empty list of plugins loads none: vLLM as it came.
    stock = generate([job], enabled=False, environment=ONE_PROCESS | {"VLLM_PLUGINS": ""})
    assert off == stock


def test_tensor_parallel(job: Job, plain: Any) -> None:
    assert tokens(generate([job | {"tensor_parallel_size": 2}])[0]) == tokens(plain)


def test_expert_parallel(job: Job, plain: Any) -> None:
    parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    assert tokens(generate([job | parallel], environment=ONE_PROCESS)[0]) == tokens(plain)


def test_threads_and_binding_do_not_change_a_bit(job: Job, plain: Any) -> None:
    environment = {"LK_THREADS": "1", "LK_THREAD_BINDING": "NUMA_NODE", "LK_POWER_SAVING": "1"}
    assert tokens(generate([job], environment=ONE_PROCESS | environment)[0]) == tokens(plain)


def test_compiled_float16_and_dummy_weights(job: Job, plain: Any, tmp_path: Path) -> None:
    folder = make("qwen3_moe", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    jobs = [
        job | {"enforce_eager": False, "compilation_config": {"mode": "VLLM_COMPILE"}},
        job | {"dtype": "float16"},
        job | {"model": str(folder), "load_format": "dummy"},
    ]
    compiled, half, dummy = generate(jobs, environment=ONE_PROCESS | {"TORCHDYNAMO_DISABLE": "0"})
    assert tokens(compiled) == tokens(plain)
    assert tokens(half) == tokens(plain)
    assert all(0 <= token < VOCABULARY for answer in tokens(dummy) for token in answer)
