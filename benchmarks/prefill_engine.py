"""Measure how much a long prefill slows down decoding, with one engine and with a prefill engine.

    python -m benchmarks.prefill_engine [--gib 1] [--prompt 4096] [--chunk 1024] [--running 2] ...

This makes a Qwen3-MoE checkpoint with meaningless weights and starts both engines once. Some
requests decode all the time. The prompt is sent alternately to the decoding engine and to the
prefill engine. The times between tokens are measured on one running request, without a prompt and
while the prompt is prefilled; the time of the prompt is that to its first token. On the CPU the
engines share cores and memory bandwidth, so what one gains the other loses.
"""

import argparse
import asyncio
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.loading import GIB, make


@dataclass
class Found:
    """The times of one prompt, in seconds."""

    steps: list[float]
    """Between the tokens of the running request, while the prompt was prefilled."""
    prompt: float
    """To the prompt's first token."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gib", type=float, default=1, help="size of the checkpoint")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens")
    parser.add_argument("--chunk", type=int, default=1024, help="most tokens in a step")
    parser.add_argument("--running", type=int, default=2, help="requests that decode")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where to put the checkpoint; default: the temporary folder"
    )
    return parser.parse_args()


class Bench:
    """The two engines, and the requests that decode."""

    def __init__(self, folder: str, given: argparse.Namespace) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        longest = 2 * given.prompt
        section = {"prefill_engine": given.prompt}
        self.llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=folder,
                skip_tokenizer_init=True,
                enforce_eager=True,
                max_model_len=longest,
                max_num_batched_tokens=given.chunk,
                kv_cache_memory_bytes=int(1.5 * GIB),
                enable_prefix_caching=False,
                additional_config={"lvllm": section},
            )
        )
        self.given = given
        self.arrivals: list[float] = []
        self._number = 0

    async def tokens(self, length: int, most: int, ours: bool, arrivals: list[float]) -> None:
        """Generate tokens and note when each of them comes.

        With `ours` the prompt stays on the decoding engine.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._number += 1
        sampling = SamplingParams(
            temperature=0,
            max_tokens=most,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            skip_reading_prefix_cache=ours,
        )
        prompt: Any = {"prompt_token_ids": [7 + (11 * n) % 490 for n in range(length)]}
        async for _ in self.llm.generate(prompt, sampling, f"r{self._number}"):
            arrivals.append(time.perf_counter())

    async def prefill(self, ours: bool) -> Found:
        begin = time.perf_counter()
        first: list[float] = []
        await self.tokens(self.given.prompt, 1, ours, first)
        within = [at for at in self.arrivals if begin <= at <= first[0]]
        return Found(steps_of(within), first[0] - begin)

    async def run(self) -> tuple[list[float], list[Found], list[Found]]:
        """The times between tokens without a prompt, and the results with one and two engines."""
        decoding = [
            asyncio.create_task(self.tokens(8, self.given.prompt, True, arrivals))
            for arrivals in (self.arrivals, *([] for _ in range(self.given.running - 1)))
        ]
        alone: list[float] = []
        found: dict[bool, list[Found]] = {True: [], False: []}
        try:
            for repeat in range(self.given.repeats + 1):
                begin = len(self.arrivals)
                await asyncio.sleep(2)
                quiet = steps_of(self.arrivals[begin:])
                for ours, results in found.items():
                    result = await self.prefill(ours)
                    if repeat:  # The first prompt of each is a warm-up.
                        results.append(result)
                alone += quiet if repeat else []
        finally:
            for task in decoding:
                task.cancel()
        return alone, found[True], found[False]


async def measure(
    folder: str, given: argparse.Namespace
) -> tuple[list[float], list[Found], list[Found]]:
    bench = Bench(folder, given)
    try:
        return await bench.run()
    finally:
        bench.llm.shutdown()


def steps_of(arrivals: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(arrivals)]


def show(alone: Sequence[float], ways: dict[str, Sequence[Found]], prompt: int) -> None:
    token = statistics.mean(alone)
    print(f"\n{'':14}{'ms a token':>12}{'times':>8}{'longest':>10}{'prompt':>10}{'times':>8}")
    print(f"{'no prompt':14}{1e3 * token:12.1f}{1:8.2f}{1e3 * max(alone):10.0f}")
    fastest = None
    for name, found in ways.items():
        steps = [step for result in found for step in result.steps]
        # All of the time counts, also that before the first token and after the last one.
        mean = sum(result.prompt for result in found) / max(len(steps), 1)
        longest = max(steps, default=mean)
        seconds = statistics.median(result.prompt for result in found)
        fastest = fastest or seconds
        print(
            f"{name:14}{1e3 * mean:12.1f}{mean / token:8.2f}{1e3 * longest:10.0f}"
            f"{seconds:8.2f} s{seconds / fastest:8.2f}"
        )
    print(f"a prompt of {prompt} tokens; means of all tokens, medians of prompts")


def main() -> None:
    given = parse()
    os.environ.setdefault("LVLLM_MOE_NUMA_ENABLED", "1")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        make(Path(folder), int(given.gib * GIB), shard=GIB)
        alone, one, two = asyncio.run(measure(folder, given))
        show(alone, {"one engine": one, "two engines": two}, given.prompt)


if __name__ == "__main__":
    main()
