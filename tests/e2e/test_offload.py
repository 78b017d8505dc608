"""Experts beside an accelerator, by its stand-in on the host: the same answers as without."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.generate import ONE_PROCESS, TINY, Job, generate
from tests.models.make import VOCABULARY

COMPILED = {"enforce_eager": False, "compilation_config": {"mode": "VLLM_COMPILE"}}
ON_CPU = {"accelerator": "host"}
AUTO = {"gpu_prefill_min_batch_size": "auto", "gpu_prefetch_window": 1}
CHOSEN = (
    r"LvLLM: LVLLM_GPU_PREFILL_MIN_BATCH_SIZE=auto is [0-9][^:]*: bus [0-9.]+ GB/s, a layer's"
    r" [0-9.]+ MB in [0-9.]+ ms; [0-9]+ tokens take it [0-9.]+ ms on the CPU \([0-9]+ tokens/s"
)
# Of the demo model's 64 experts, 21 have slots: five or six of each layer.
CACHED = {"gpu_expert_cache": "0.002"}
DEFERRED = ON_CPU | {"defer_experts": 2}
STREAMED = ON_CPU | {"gpu_prefill_min_batch_size": 16, "gpu_prefetch_window": 1}


def test_all_ways_of_a_batch(qwen3_moe: Path, tmp_path: Path) -> None:
    """Prompts that are longer than a batch, and a model with a dense layer among the others."""
    draw = random.Random(5)
    # Beside it, the cache saves what was read. Without an index, all files with weights are loaded.
    others = shutil.ignore_patterns("lvllm-expert-reads-*")  # Another test's servers leave some.
    demo = shutil.copytree(TINY, tmp_path / "tiny-moe", ignore=others)
    prompts = [[draw.randrange(3, 40) for _ in range(n)] for n in (3, 18, 61)]
    tiny: Job = {"model": str(demo), "prompts": prompts, "max_tokens": 12}
    tiny |= {"max_num_batched_tokens": 32, "enable_chunked_prefill": True}
    ids = [[draw.randrange(VOCABULARY) for _ in range(n)] for n in (5, 40)]
    other: Job = {"model": str(qwen3_moe), "prompts": ids, "max_tokens": 6}

    def with_settings(job: Job, settings: dict[str, Any]) -> Job:
        return job | {"additional_config": {"lvllm": settings}}

    jobs = [with_settings(job, {}) for job in (tiny, other, tiny | COMPILED)]
    jobs += [with_settings(job, ON_CPU) for job in (tiny, other, tiny | COMPILED)]
    ways = (STREAMED, ON_CPU | AUTO, ON_CPU | CACHED, STREAMED | CACHED, DEFERRED)
    jobs += [with_settings(tiny, one) for one in ways]
    environment = ONE_PROCESS | {"TORCHDYNAMO_DISABLE": "0"}
    answers = generate(jobs, environment=environment, logged=CHOSEN, together=True)
    assert len(list(demo.glob("lvllm-expert-reads-*"))) == 1
    without, beside = answers[:3], answers[3:6]
    streamed, auto, cached, both, deferred = answers[6:]
    assert beside == without  # every bit of every log-probability
    # The GPU rounds elsewhere than lk. Had it computed no experts, nothing would differ.
    assert without[0] not in (streamed, cached, both)
    assert streamed not in (cached, both)
    for got, want in zip(streamed + auto + cached + both, without[0] * 4, strict=True):
        assert got["tokens"] == want["tokens"]
        assert got["logprobs"] == pytest.approx(want["logprobs"], abs=0.15)
    # Prompts fill batches of more than 8 tokens, whose experts are not deferred, and so the first
    # token is the same. The batches of the last tokens have 3.
    for got, want in zip(deferred, without[0], strict=True):
        assert got["logprobs"][0] == want["logprobs"][0]
        assert got["logprobs"][1:] != want["logprobs"][1:]
    # Two ranks that measure together, by variables.
    variables = {f"LVLLM_{key.upper()}": str(value) for key, value in (ON_CPU | AUTO).items()}
    divided = tiny | {"tensor_parallel_size": 2}
    (ranks,) = generate([divided], environment=ONE_PROCESS | variables, logged=CHOSEN)
    assert [one["tokens"] for one in ranks] == [one["tokens"] for one in without[0]]
