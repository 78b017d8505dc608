"""Tests vLLM with LvLLM on a GPU, against stock vLLM on it, with the demo model."""

from typing import Any

import pytest
import torch

from tests.gpu.on_device.answers import TOGETHER, Answers, answer

BOUND = 0.15
"""How much a log-probability may differ: experts round elsewhere on the CPU and when streamed."""
EAGER = {"enforce_eager": True}
STREAMED = {"gpu_prefill_min_batch_size": 16, "gpu_prefetch_window": 1}
CACHED = STREAMED | {"gpu_expert_cache": "0.002"}
GRAPHS = {"cudagraph_capture_sizes": [1, 2, 4, 8], "max_cudagraph_capture_size": 8}
DECODING = {"compilation_config": GRAPHS | {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hybrid": ({}, EAGER),
    "streamed, by mailbox": (STREAMED | {"gpu_call": "mailbox"}, EAGER),
    "half resident": ({"gpu_resident_moe_layers": "0"}, EAGER),
    "some experts in the cache": (CACHED, EAGER),
    "graphs of decoding, with a cache": (
        {"gpu_call": "auto", "gpu_expert_cache": "0.002"},
        DECODING,
    ),
    "graphs of decoding and pieces": (
        STREAMED,
        {"compilation_config": GRAPHS | {"cudagraph_mode": "FULL_AND_PIECEWISE"}},
    ),
    "graphs that attention breaks": (
        STREAMED,
        {
            "environment": {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"},
            "compilation_config": GRAPHS | {"cudagraph_mode": "FULL_AND_PIECEWISE"},
        },
    ),
    "the first model runner, with graphs": (
        CACHED,
        DECODING | {"environment": {"VLLM_USE_V2_MODEL_RUNNER": "0"}},
    ),
}
"""LvLLM's settings, and arguments of `answer`."""
OF_TWO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "half of each expert, with graphs": (CACHED, DECODING | {"tensor_parallel_size": 2}),
    "half of the experts": (
        CACHED,
        EAGER | {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    ),
    "half of the layers, with graphs": (CACHED, DECODING | {"pipeline_parallel_size": 2}),
}
"""The same for two devices, by what each of them has."""


@pytest.fixture(scope="module")
def stock() -> Answers:
    answers, _ = answer(None, enforce_eager=True)
    return answers


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_of_stock_vllm(way: str, stock: Answers) -> None:
    compare(*WAYS[way], stock)


@pytest.mark.gpu
@pytest.mark.parametrize("way", OF_TWO)
def test_answers_of_two_devices_are_those_of_stock_vllm_on_one(way: str, stock: Answers) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one device")
    compare(*OF_TWO[way], stock)


def compare(settings: dict[str, Any], arguments: dict[str, Any], stock: Answers) -> None:
    answers, log = answer(settings, **arguments)
    print("\n".join(line for line in log.splitlines() if "LvLLM" in line))
    check(answers, stock)


def check(answers: Answers, stock: Answers) -> None:
    """Assert that tokens agree, but for near ties, and log-probabilities as far as they do."""
    equal = total = 0
    for together, got, want in zip(TOGETHER, answers, stock, strict=True):
        assert len(got) == len(want) == together
        for (tokens, logprobs), (wanted, wanted_logprobs) in zip(got, want, strict=True):
            alike = [a == b for a, b in zip(tokens, wanted, strict=True)]
            same = alike.index(False) if False in alike else len(alike)
            equal, total = equal + same, total + len(alike)
            assert logprobs[:same] == pytest.approx(wanted_logprobs[:same], abs=BOUND)
    assert equal >= 0.9 * total
