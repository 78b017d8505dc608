"""Tests which memory the cache of experts takes from the KV cache."""

from collections.abc import Iterator
from random import randrange
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from lvllm.faults import leaving
from lvllm.gpu import caches
from lvllm.gpu.offload import Offload
from lvllm.gpu.stand_in import StandInAccelerator
from lvllm.units import MIB
from lvllm.worker.cpu import HybridCPUWorker
from lvllm.worker.expert_cache import SCRATCH, leave_room
from lvllm.worker.gpu import HybridGPUWorker
from tests.random_layers import Random, random_layer

EXPERTS, HIDDEN, INTERMEDIATE = 8, 256, 256
EXPERT = 2 * 3 * HIDDEN * INTERMEDIATE
BLOCK = 16
TOKEN = 2 * 2 * 4 * 64
"""Bytes of keys and values of a token, in one layer."""


class Model:
    """Takes the place of what the layers of a model have in common."""


@pytest.fixture
def layer() -> Iterator[object]:
    """A layer of a model whose cache waits for its size."""
    accelerator, one = StandInAccelerator(), Model()
    experts = random_layer(Random(randrange(1 << 30)), "bf16", EXPERTS, HIDDEN, INTERMEDIATE).make()
    joined = Offload.announce(0, one, lambda: Offload(accelerator, 8, cache_bytes="auto"))
    yield joined.add(0, "layers.0", experts, topk=2)
    accelerator.close()


def worker(longest: int) -> Any:
    """A worker with two layers of attention, and requests of up to `longest` tokens."""
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=4, head_size=64, dtype=torch.bfloat16)
    model = SimpleNamespace(max_model_len=longest)
    parallel = SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1)
    vllm_config = SimpleNamespace(model_config=model, parallel_config=parallel)
    return SimpleNamespace(
        vllm_config=vllm_config, get_kv_cache_spec=lambda: {"a": spec, "b": spec}
    )


def test_the_kv_cache_keeps_a_quarter(layer: object) -> None:
    available = 4 * (SCRATCH + 3 * EXPERT)
    left = leave_room(worker(BLOCK), available)
    (cache,) = caches()
    # A quarter and the scratch memory are left out, and all 8 experts fit in the rest.
    assert cache.nbytes == EXPERTS * EXPERT
    assert left == available - EXPERTS * EXPERT - SCRATCH
    assert leave_room(worker(BLOCK), 5 * MIB) == 5 * MIB  # There is no other cache to open.


def test_the_kv_cache_keeps_two_requests(layer: object) -> None:
    requests = 2 * 2 * 4000 * BLOCK * TOKEN
    available = requests + SCRATCH + 3 * EXPERT + EXPERT // 2
    assert requests > available // 4
    left = leave_room(worker(4000 * BLOCK), available)
    (cache,) = caches()
    assert cache.nbytes == 3 * EXPERT
    assert left == requests + EXPERT // 2


def test_no_expert_has_room(layer: object) -> None:
    for available in (0, 10 * MIB, SCRATCH + EXPERT):
        assert leave_room(worker(BLOCK), available) == available
        assert caches() == []


@pytest.mark.parametrize("kind", [HybridCPUWorker, HybridGPUWorker])
def test_the_end_of_a_worker_saves_the_counts(
    layer: object, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_room(worker(BLOCK), 4 * (SCRATCH + 3 * EXPERT))
    (cache,) = caches()
    done: list[str] = []
    monkeypatch.setattr(type(cache), "save", lambda _: done.append("saved"))
    monkeypatch.setattr(leaving, "collect_nothing_more", lambda: None)
    monkeypatch.setattr(kind.__mro__[1], "shutdown", lambda _: done.append("ended"))
    ending: Any = object.__new__(kind)
    ending.shutdown()
    assert done == ["saved", "ended"]


def test_without_a_cache_nothing_changes() -> None:
    assert leave_room(worker(BLOCK), 123 * MIB) == 123 * MIB
