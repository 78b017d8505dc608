"""Two servers' engines on one host with one copy of the experts, through vLLM."""

import json
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.loading import make
from tests.e2e.generate import DEFAULTS, ONE_PROCESS, TINY
from tests.e2e.warm_process import fork

MIB = 1 << 20

OFFLOADED = {"accelerator": "host"}
STREAMED = OFFLOADED | {"gpu_prefill_min_batch_size": 16, "gpu_prefetch_window": 1}
SETTINGS: dict[str, dict[str, Any]] = {"KEEP": {}, "INT4": {"moe_use_weight": "INT4"}}
OF_TINY: dict[str, dict[str, Any]] = {"HYBRID": OFFLOADED, "STREAMED": STREAMED}
"""Of a small model beside an accelerator, with experts in callbacks or copied."""


def run(jobs: list[dict[str, Any]], prompts: list[list[int]]) -> None:
    """In a forked process, with one model after the other: answer, and say how much shared memory
    the process has mapped and its share of that; and again when told to.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    sampling = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=1
    )

    def answer(llm: Any) -> None:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
        steps = [[list(o.outputs[0].token_ids), o.outputs[0].cumulative_logprob] for o in outputs]
        areas = re.split(r"\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text())
        areas = [area for area in areas if "lvllm-experts" in area]
        kib = [
            sum(int(n) for a in areas for n in re.findall(rf"\n{name}:\s+(\d+)", a))
            for name in ("Rss", "Pss")
        ]
        print("answer", json.dumps([steps, *(1024 * n for n in kib)]), flush=True)

    for options in jobs:
        llm = LLM(**options)
        answer(llm)
        while sys.stdin.readline() == "again\n":
            answer(llm)
        del llm
        cleanup_dist_env_and_memory()


class Engine:
    """A process with an engine of its own, none of it in other processes."""

    def __init__(self, model: Path, prompts: list[list[int]], alone: str, tiny: str) -> None:
        """First the kinds `alone` and `tiny` without sharing, then each kind shared."""
        kinds = [(model, SETTINGS[alone]), (TINY, OF_TINY[tiny])]
        for of, settings in ((model, SETTINGS), (TINY, OF_TINY)):
            kinds += [(of, kind | {"share_experts": 1}) for kind in settings.values()]
        jobs = [
            DEFAULTS | {"model": str(of), "additional_config": {"lvllm": settings}}
            for of, settings in kinds
        ]
        self.said: list[str] = []
        asks, words = os.pipe()
        lines, says = os.pipe()
        self.told, self.lines = os.fdopen(words, "w"), os.fdopen(lines)
        with open(asks) as stdin, open(says, "w") as stdout:
            self.child = fork(
                run,
                jobs,
                prompts,
                environment=os.environ
                | {"LVLLM_MOE_NUMA_ENABLED": "1", "LK_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
                | ONE_PROCESS,
                stdin=stdin,
                stdout=stdout,
            )

    def until(self, word: str) -> str:
        """The next line that begins so, or has it."""
        for line in self.lines:
            self.said.append(line)
            if word in line:
                return line
        raise AssertionError("".join(self.said)[-6000:])

    def answer(self) -> tuple[list[object], int, int]:
        """Tokens and log-probabilities, shared bytes mapped, and its share of them."""
        steps, mapped, share = json.loads(self.until("answer ").partition(" ")[2])
        return steps, mapped, share

    def tell(self, word: str) -> None:
        """again: answer; next: load the next model."""
        self.told.write(f"{word}\n")
        self.told.flush()

    def loaded(self) -> bool:
        """Whether it has loaded the last model, or another engine."""
        found = re.findall(r"experts (lie in shared memory|are those of)", "".join(self.said))
        return bool(found[-1].startswith("lie"))

    def read(self) -> float:
        """GiB of the last model."""
        return float(re.findall(r"LvLLM: read (\S+) GiB", "".join(self.said))[-1])

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()
        self.told.close()
        self.lines.close()


def test_two_engines_with_one_copy(tmp_path: Path) -> None:
    """The same tokens and probabilities as alone, of experts in the checkpoint's format and of
    converted ones, which are in memory once, and of those beside an accelerator; they outlive the
    engine that loaded them.
    """
    make(tmp_path, 200 * MIB, shard=1 << 60)
    weights = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    prompts = [[random.randrange(3, 40) for _ in range(n)] for n in (5, 17)]
    both = [
        Engine(tmp_path, prompts, alone, tiny)
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
