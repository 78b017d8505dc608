"""A process with an engine of its own, which answers and tells of the memory that it shares."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from tests.e2e.generate import DEFAULTS, ONE_PROCESS
from tests.e2e.warm_process import fork

__all__ = ["Engine"]


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

    def __init__(self, kinds: list[tuple[Path, dict[str, Any]]], prompts: list[list[int]]) -> None:
        """With these models one after the other, each with LvLLM's settings for it."""
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
