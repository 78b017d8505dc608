"""Two servers' engines on one host with one copy of the experts, through vLLM."""

import os
import random
from pathlib import Path
from typing import Any

from benchmarks.loading import make
from tests.e2e.generate import TINY
from tests.e2e.sharing_engine import Engine

MIB = 1 << 20

OFFLOADED = {"accelerator": "host"}
STREAMED = OFFLOADED | {"gpu_prefill_min_batch_size": 16, "gpu_prefetch_window": 1}
SETTINGS: dict[str, dict[str, Any]] = {"KEEP": {}, "INT4": {"moe_use_weight": "INT4"}}
OF_TINY: dict[str, dict[str, Any]] = {"HYBRID": OFFLOADED, "STREAMED": STREAMED}
"""Of a small model beside an accelerator, with experts in callbacks or copied."""


def of_kinds(model: Path, prompts: list[list[int]], alone: str, tiny: str) -> Engine:
    """First the kinds `alone` and `tiny` without sharing, then each kind shared."""
    kinds = [(model, SETTINGS[alone]), (TINY, OF_TINY[tiny])]
    for of, settings in ((model, SETTINGS), (TINY, OF_TINY)):
        kinds += [(of, kind | {"share_experts": 1}) for kind in settings.values()]
    return Engine(kinds, prompts)


def test_two_engines_with_one_copy(tmp_path: Path) -> None:
    """The same tokens and probabilities as alone, of experts in the checkpoint's format and of
    converted ones, which are in memory once, and of those beside an accelerator; they outlive the
    engine that loaded them.
    """
    make(tmp_path, 200 * MIB, shard=1 << 60)
    weights = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    prompts = [[random.randrange(3, 40) for _ in range(n)] for n in (5, 17)]
    both = [
        of_kinds(tmp_path, prompts, alone, tiny)
        for alone, tiny in zip(SETTINGS, OF_TINY, strict=True)
    ]
    try:
        # Each with a copy of its own.
        expected = {}
        for kinds in (SETTINGS, OF_TINY):
            for kind, engine in zip(kinds, both, strict=True):
                expected[kind], *shared = engine.answer()
                assert shared == [0, 0]
                if kinds is SETTINGS:
                    engine.tell("next")
        assert expected["KEEP"] != expected["INT4"]
        assert expected["HYBRID"] != expected["STREAMED"]  # which round elsewhere
        for kind, size in (("KEEP", 0.7), ("INT4", 0.7 * 4.5 / 16)):
            for engine in both:
                engine.tell("next")
            assert [engine.answer()[0] for engine in both] == [expected[kind]] * 2, kind
            mapped, shares = [], []
            for engine in both:
                engine.tell("again")
                steps, mine, share = engine.answer()
                assert steps == expected[kind], kind
                mapped.append(mine)
                shares.append(share)
            # What only the owner has touched yet is its own share. A second copy would double it.
            assert max(mapped) >= size * weights
            assert min(mapped) > 0.1 * max(mapped)
            assert sum(shares) <= 1.1 * max(mapped)
        # Whichever came first has loaded, and the other has read no experts.
        first, second = sorted(both, key=lambda engine: not engine.loaded())
        assert (first.loaded(), second.loaded()) == (True, False)
        assert second.read() < 0.2 * first.read()
        for kind in OF_TINY:
            for engine in both:
                engine.tell("next")
            assert [engine.answer()[0] for engine in both] == [expected[kind]] * 2, kind
        first, second = sorted(both, key=lambda engine: not engine.loaded())
        assert (first.loaded(), second.loaded()) == (True, False)
        first.kill()
        second.tell("again")
        steps, mine, share = second.answer()
        assert (steps, share) == (expected["STREAMED"], mine)
    finally:
        for engine in both:
            engine.kill()
    assert not [name for name in os.listdir("/dev/shm") if "lvllm" in name]
